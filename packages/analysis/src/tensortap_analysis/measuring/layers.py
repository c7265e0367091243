"""Layers of one run seen one after the other: sudden jumps, NaN and abnormal magnitudes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tensortap.errors import NotSupported, RunError
from tensortap.records import decode_float, encode_float
from tensortap_analysis.captured.moments import Catalogue, Moment
from tensortap_analysis.captured.words import layer_of
from tensortap_analysis.measuring.crews import ALONE, Crew
from tensortap_analysis.measuring.examining import BLOCK, blocks
from tensortap_analysis.metrics import change
from tensortap_analysis.pairs.alignment import align
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.pairs.pairing import Match
from tensortap_analysis.rendering import cell

JUMP = 10.0
"""The largest |L_i - L_(i-1)| that is not called a jump, and the largest |mean| that is normal."""


@dataclass(frozen=True, slots=True)
class Change:
    """From one layer's output to the next, in both runs: largest and mean |L_i - L_(i-1)|.

    `None` where a run has no values of them.
    """

    before: str
    at: Moment
    ref_max: float | None
    ref_mean: float | None
    other_max: float | None
    other_mean: float | None

    @property
    def jumps(self) -> bool:
        """Is it a jump in either run? One to NaN or Inf is none: such layers are abnormal."""
        return any(x is not None and JUMP < x < math.inf for x in (self.ref_max, self.other_max))

    def __str__(self) -> str:
        return (
            f"{self.before} -> {self.at.name} ({self.at.when}): max |change| "
            f"{cell(self.ref_max)} in REF, {cell(self.other_max)} in RUN; mean |change| "
            f"{cell(self.ref_mean)}, {cell(self.other_mean)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the inverse is `from_json`."""
        return {"before": self.before, "at": asdict(self.at)} | {
            name: encode_float(getattr(self, name)) for name in _NUMBERS
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Change:
        """Inverse of `to_json`."""
        numbers = {name: decode_float(document[name]) for name in _NUMBERS}
        return cls(document["before"], Moment(**document["at"]), **numbers)


_NUMBERS = ("ref_max", "ref_mean", "other_max", "other_mean")


def changes(
    matches: Iterable[Match],
    ref: Catalogue,
    other: Catalogue,
    *,
    block: int = BLOCK,
    crew: Crew = ALONE,
) -> Iterator[Change]:
    """What each layer changes of the output of the layer before it, of layers both runs have.

    The tensors have been compared: their digests are not verified once more.
    """

    def between(pair: tuple[Match, Match]) -> Change:
        before, after = pair
        one = _change(ref, before.ref, after.ref, block)
        two = _change(other, before.other, after.other, block)
        return Change(before.name, after.at, *one, *two)

    return crew.each(between, list(_neighbours(matches)))


def _neighbours(matches: Iterable[Match]) -> Iterator[tuple[Match, Match]]:
    """Outputs of layers whose numbers follow each other, at the same moment."""
    last: dict[tuple[object, ...], tuple[int, Match]] = {}
    for match in matches:
        number = _layer_output(match.name)
        if number is None or match.is_part:
            continue
        at = match.ref
        key = (match.name.split("layers.")[0], *asdict(at.renamed("")).values())
        if key in last and last[key][0] == number - 1:
            yield last[key][1], match
        last[key] = (number, match)


def _layer_output(name: str) -> int | None:
    """3 for `layers.3/forward/output`; `None` for anything but the output of a whole layer."""
    module, _, tensor = name.partition("/")
    number = layer_of(module)
    whole = tensor == "forward/output" and module.endswith(f"layers.{number}")
    return number if whole else None


def _change(
    side: Catalogue, before: Moment, after: Moment, block: int
) -> tuple[float | None, float | None]:
    """Largest and mean |change|, NaN where a change is not finite; `None` without values."""
    if side.moments[before].values != "full" or side.moments[after].values != "full":
        return None, None
    try:
        one, two = (side.tensor(x, x.name, verify=False) for x in (before, after))
        aligned = align(one.shape, one.dims, two.shape, two.dims)
        if isinstance(aligned, str) or not math.prod(aligned.shape):
            return None, None
        largest, total = change(blocks(one, two, aligned, block))
    except (RunError, NotSupported):
        return None, None  # the pair itself says what is wrong with these tensors
    return largest, total / math.prod(aligned.shape)


def abnormal(pairs: Sequence[Pair]) -> Iterator[str]:
    """A sentence for each tensor with NaN, infinities or |mean| > 10, saying in which run."""
    for pair in pairs:
        found = pair.metrics
        sides = (
            ("REF", _odd(found.nan_ref, found.inf_ref, found.ref.mean)),
            ("RUN", _odd(found.nan_other, found.inf_other, found.other.mean)),
        )
        said = [f"{who} {what}" for who, what in sides if what]
        if said and _is_activation(pair):
            yield f"{pair.name} ({pair.at.when}): {'; '.join(said)}"


def _odd(nan: int, inf: int, mean: float | None) -> str:
    counts = [f"{count:,} {word}" for count, word in ((nan, "NaN"), (inf, "Inf")) if count]
    size = [f"mean {mean:.4g}"] if mean is not None and abs(mean) > JUMP else []
    return ", ".join(counts + size)


def _is_activation(pair: Pair) -> bool:
    """Indices are large and masks infinite by nature."""
    _, phase, tensor = pair.name.split("/")
    return pair.ref.dtype.startswith(("float", "bfloat")) and (
        phase != "forward" or not tensor.startswith("input.")
    )
