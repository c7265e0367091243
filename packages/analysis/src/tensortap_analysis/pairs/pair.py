"""What is known of two tensors that were compared: frozen data, which needs no run any more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from tensortap.records import decode_float, encode_float
from tensortap_analysis.captured.moments import Moment
from tensortap_analysis.metrics import Metrics

By = Literal["values", "sample", "statistics"]


@dataclass(frozen=True, slots=True)
class Half:
    """One of the two tensors, as it was captured (a part: as it was cut)."""

    shape: tuple[int, ...]
    dtype: str
    dims: str | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """What statistics prove: the differences are at least this large.

    By the triangle inequality |rms(b) - rms(a)| <= rms(b - a), and likewise for mean, std and the
    extremes. `same` says that no statistic differs at all, which proves nothing, but hints.
    """

    rmse: float
    max_abs: float
    relative_l2: float
    nonfinite: bool
    same: bool


@dataclass(frozen=True, slots=True)
class Passed:
    """What a product makes of its operands' errors, and the error beyond it; relative L2.

    Measured by putting each run's own operands through the product.
    """

    inherited: float
    local: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of both runs, and how they differ.

    `metrics` of a pair compared by statistics hold what each side said of itself and no
    difference; `bounds` tell how large it must be. `noise` is the same of the noise run, where
    there is one. `passed` tells inherited from added error, where that was measured. `order` is
    the place in the execution order of the reference. `traced`: what it was computed from was
    looked for in the whole runs, also among what was not selected.
    """

    at: Moment
    order: int
    by: By
    ref: Half
    other: Half
    metrics: Metrics
    bounds: Bounds | None = None
    note: str | None = None
    noise: Pair | None = None
    passed: Passed | None = None
    traced: bool = False

    @property
    def numbers(self) -> tuple[object, ...]:
        """What is equal for a tensor and the same one under another name, if it differs."""
        found = self.metrics
        return (found.count, found.ref.rms, found.other.rms, found.mse, found.max_abs)

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.at.name

    @property
    def nonfinite(self) -> bool:
        """Is there a NaN or infinity where the other side has something else?"""
        if self.bounds is not None:
            return self.bounds.nonfinite
        return self.metrics.nonfinite_mismatches > 0

    @property
    def equal(self) -> bool:
        """The same bits; of statistics, the same numbers."""
        return self.bounds.same if self.bounds is not None else self.metrics.bitwise_equal

    @property
    def rmse(self) -> float:
        """Root mean square of the differences; of statistics, what it is at least."""
        return (self.bounds.rmse if self.bounds is not None else self.metrics.rmse) or 0.0

    @property
    def max_abs(self) -> float:
        """Largest difference; of statistics, what it is at least."""
        return (self.bounds.max_abs if self.bounds is not None else self.metrics.max_abs) or 0.0

    @property
    def error(self) -> float:
        """Relative L2 error: 0 where nothing differs, infinite for a NaN on one side only."""
        if self.nonfinite:
            return math.inf
        if self.rmse == 0:
            return 0.0
        found = self.metrics.relative_l2 if self.bounds is None else self.bounds.relative_l2
        return math.inf if found is None else found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse is `from_json`."""
        plain = {"order": self.order, "by": self.by, "note": self.note, "traced": self.traced}
        return plain | {
            "at": asdict(self.at),
            "ref": asdict(self.ref),
            "other": asdict(self.other),
            "metrics": self.metrics.to_json(),
            "bounds": None if self.bounds is None else _encoded(self.bounds),
            "noise": None if self.noise is None else self.noise.to_json(),
            "passed": None if self.passed is None else _encoded(self.passed),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Pair:
        """Inverse of `to_json`; raises `KeyError`, `TypeError` or `ValueError` otherwise."""
        bounds, noise, passed = (document[key] for key in ("bounds", "noise", "passed"))
        return cls(
            at=Moment(**document["at"]),
            order=int(document["order"]),
            by=_by(document["by"]),
            ref=_half(document["ref"]),
            other=_half(document["other"]),
            metrics=Metrics.from_json(document["metrics"]),
            bounds=None if bounds is None else _bounds(bounds),
            note=document["note"],
            noise=None if noise is None else cls.from_json(noise),
            passed=None if passed is None else _passed(passed),
            traced=bool(document.get("traced", False)),
        )

    def with_noise(self, noise: Pair | None) -> Pair:
        """The same pair beside what the noise run differs by."""
        return replace(self, noise=noise)


def _encoded(found: Bounds | Passed) -> dict[str, Any]:
    values = asdict(found)
    return {key: encode_float(x) if isinstance(x, float) else x for key, x in values.items()}


def _bounds(document: Mapping[str, Any]) -> Bounds:
    floats = ("rmse", "max_abs", "relative_l2")
    found = {field.name: document[field.name] for field in fields(Bounds)}
    return Bounds(**found | {key: decode_float(found[key]) for key in floats})


def _passed(document: Mapping[str, Any]) -> Passed:
    inherited, local = (decode_float(document[key]) for key in ("inherited", "local"))
    if inherited is None or local is None:
        raise ValueError("passed-on errors are numbers")
    return Passed(inherited, local)


def _half(document: Mapping[str, Any]) -> Half:
    return Half(tuple(map(int, document["shape"])), str(document["dtype"]), document["dims"])


def _by(word: str) -> By:
    if word not in ("values", "sample", "statistics"):
        raise ValueError(f"{word!r} is no way to compare.")
    return word  # type: ignore[return-value]
