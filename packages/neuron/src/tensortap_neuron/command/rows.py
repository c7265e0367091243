"""A layer of both runs as a row of a table, and sudden changes from one layer to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from tensortap.records import encode_float
from tensortap_neuron.command.describing import MEAN
from tensortap_neuron.command.naming import Place, place
from tensortap_neuron.command.printing import cell

if TYPE_CHECKING:
    from tensortap_analysis import Judgement, Pair

HEADINGS = (
    "", "layer", "max |d|", "mean |d|", "median |d|", "max rel", "mean rel", "median rel", "cosine",
)  # fmt: skip
WITH_NOISE = ("Bhattacharyya",)


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of both runs: what they differ by, and how that is judged."""

    place: Place
    pair: Pair
    judgement: Judgement
    title: str

    @property
    def fine(self) -> bool:
        """Is it within its limits?"""
        return self.judgement.within and self.judgement.decided

    @property
    def measures(self) -> dict[str, float | None]:
        """Absolute and relative differences, largest, mean and median; cosine."""
        m = self.pair.metrics
        return {
            "max_abs": m.max_abs,
            "mae": m.mae,
            "median": m.percentiles.get(50),
            "relative_max": m.relative_max,
            "relative_mean": m.relative_mean,
            "relative_median": m.relative_median,
            "cosine": m.cosine,
        }

    @property
    def ratio(self) -> float | None:
        """The RMS error over the noise run's; `None` without noise, or where that has none."""
        noise = self.pair.noise
        if noise is None or self.pair.nonfinite or noise.nonfinite or not noise.rmse:
            return None
        return self.pair.rmse / noise.rmse

    @property
    def likeness(self) -> float | None:
        """Bhattacharyya coefficient of the two error distributions."""
        from tensortap_analysis.metrics import bhattacharyya

        noise = self.pair.noise
        return None if noise is None else bhattacharyya(self.pair.metrics, noise.metrics)

    @property
    def cells(self) -> tuple[object, ...]:
        """Under `HEADINGS`, without the mark."""
        found = self.measures
        cosine = found.pop("cosine")
        return self.title, *found.values(), None if cosine is None else f"{cosine:.8f}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        measures = {key: _plain(value) for key, value in self.measures.items()}
        return {
            "layer": self.place.title,
            "name": self.place.name,
            "step": self.pair.at.step,
            "microbatch": self.pair.at.microbatch,
            "fine": self.fine,
            "grade": self.judgement.grade,
            "excess": encode_float(self.judgement.excess),
            **measures,
            "noise_ratio": _plain(self.ratio),
            "bhattacharyya": _plain(self.likeness),
        }


@dataclass(frozen=True, slots=True)
class Jump:
    """A sudden change from one layer to the next, in a run: largest |change|, and mean ones."""

    who: str
    before: Place
    at: Place
    largest: float
    into: float | None
    out: float | None

    def __str__(self) -> str:
        return (
            f"{self.who}: {self.before.title} -> {self.at.title}: max |change| "
            f"{cell(self.largest)}; mean |change| {cell(self.into)} into it, "
            f"{cell(self.out)} out of it"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "run": self.who,
            "from": self.before.name,
            "to": self.at.name,
            "max_change": _plain(self.largest),
            "mean_change_into": _plain(self.into),
            "mean_change_out_of": _plain(self.out),
        }


def jumps_at(change: Any, after: Any) -> Iterator[Jump]:
    """In either run; `after` is the change that follows, `None` behind the last layer."""
    from tensortap_analysis.measuring.layers import JUMP

    before, at = place(change.before), place(change.at.name)
    assert before is not None  # changes are between outputs of layers
    assert at is not None
    for side, who in (("ref", "reference"), ("other", "port")):
        largest = getattr(change, f"{side}_max")
        # NaN and infinities are told of the layer that has them.
        if largest is not None and isfinite(largest) and largest > JUMP:
            into, out = (getattr(c, f"{side}_mean", None) for c in (change, after))
            yield Jump(who, before, at, largest, into, out)


def broken_in(pair: Pair) -> str:
    """What is wrong with a layer in either run: NaN, infinities, an abnormal mean."""
    m = pair.metrics
    both = (("port", m.nan_other, m.inf_other, m.other), ("reference", m.nan_ref, m.inf_ref, m.ref))
    said = []
    for who, nan, inf, side in both:
        words = [f"{n:,} {word}" for n, word in ((nan, "NaN"), (inf, "Inf")) if n]
        if side.mean is not None and abs(side.mean) > MEAN:
            words.append(f"mean {side.mean:.4g}")
        said += [f"{who} {', '.join(words)}"] if words else []
    return "; ".join(said)


def _plain(value: float | None) -> float | str | None:
    return None if value is None else encode_float(value)
