"""Where two runs part: errors that a layer adds, told from those that it inherits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tensortap_analysis.divergence.inheritance import CLEAR, Basis, Inheritance, inheritance
from tensortap_analysis.divergence.modules import Tensor
from tensortap_analysis.divergence.upstream import Sources
from tensortap_analysis.judging.judgement import Judgement
from tensortap_analysis.pairs.pair import Pair

Origin = Literal["local", "inherited", "unknown"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A tensor beyond its limit, the errors of what it was computed from, and what that explains.

    All errors are relative (L2 of the difference over L2 of the reference). `origin` is what is
    certain: `local` where the inputs' errors cannot explain the error, and `unknown` where they
    cannot, but something it was computed from was not compared: `missing` names that. `inherited`
    is what they are expected to make of it, `local` what was added here, by `basis` (see
    `Inheritance`).
    """

    pair: Pair
    judgement: Judgement
    inputs: tuple[Pair, ...]
    error: float
    inherited: float
    local: float
    origin: Origin
    basis: Basis
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Canonical name of the tensor."""
        return self.pair.name

    @property
    def suspicious(self) -> bool:
        """Was more added here than passes for amplification?

        Gradients are amplified by more than can be told from an error, unless it is certain.
        """
        estimated = self.basis in ("noise", "expected")
        forward = Tensor.of(self.name).phase == "forward"
        clear = forward and estimated and self.error > CLEAR * self.inherited and not self.missing
        return self.origin == "local" or clear

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.pair.at.when}): {_size(self)}{self.judgement.grade}; "
            f"{_share(self)}; {_beside(self)}"
        )


def _size(found: Divergence) -> str:
    if found.pair.nonfinite:
        return ""  # the grade says it
    least = "at least " if found.pair.by == "statistics" else ""
    return f"relative error {least}{_short(found.error)}, "


def _share(found: Divergence) -> str:
    """What was added here, in words."""
    if found.origin == "unknown":
        return "unknown: inherited or added here"
    if math.isinf(found.error):
        return "first seen here" if found.origin == "local" else "inherited"
    if found.basis == "statistics":
        return "inherited or added here: statistics do not tell"
    about = "" if found.basis == "measured" or not found.inherited else "about "
    about = "at least " if found.pair.by == "statistics" else about
    return f"{found.origin}: {about}{_short(found.local)} added here"


def _beside(found: Divergence) -> str:
    """The inputs and their errors, or why there are none."""
    tensor = Tensor.of(found.name)
    worst = sorted((p for p in found.inputs if p.error > 0), key=lambda p: -p.error)[:3]
    inputs = "its inputs: " + ", ".join(f"{p.name} {_short(p.error)}" for p in worst)
    if found.origin == "unknown":
        return f"{inputs}; {_lacking(found)}" if worst else _lacking(found)
    if worst:
        return inputs
    if tensor.is_from_outside:
        return "the runs were given other data"
    return (
        "the weights differ" if tensor.phase == "param" else "nothing it was computed from differs"
    )


def _lacking(found: Divergence) -> str:
    """What would have to be compared to tell."""
    *more, last = found.missing[:3]
    if not more:
        return f"{last} would tell, and was not compared: capture it in both runs"
    names = f"{', '.join(more)} and {last}"
    return f"{names} would tell, and were not compared: capture them in both runs"


def divergences(
    pairs: Sequence[Pair], judgements: Sequence[Judgement], sources: Sequence[Sources]
) -> Iterator[Divergence]:
    """Every tensor beyond its limit, in execution order, with what its inputs explain.

    `sources` are what `upstream` says of the pairs. A weight comes before what was made with it,
    also where it was recorded afterwards.
    """
    told: set[int] = set()
    for place, judgement in enumerate(judgements):
        for one in (*(late for late in sources[place].places if late > place), place):
            if not (judgements[one].within or judgement.within or one in told):
                told.add(one)
                yield divergence(pairs, judgements[one], sources[one], one)


def divergence(
    pairs: Sequence[Pair], judgement: Judgement, sources: Sources, place: int
) -> Divergence:
    """Of the pair at this place, judged to be beyond its limit."""
    pair, found = pairs[place], inheritance(pairs[place], sources, pairs)
    given = tuple(pairs[at] for at in sources.places)
    origin = _origin(pair, judgement, found, sources)
    local = found.local
    if math.isinf(pair.error):
        local = 0.0 if origin == "inherited" else math.inf
    return Divergence(
        pair, judgement, given, pair.error, found.inherited, local, origin, found.basis,
        sources.missing,
    )  # fmt: skip


def _origin(pair: Pair, judgement: Judgement, found: Inheritance, sources: Sources) -> Origin:
    if not _is_local(pair, judgement, found):
        return "inherited"
    return "unknown" if sources.missing else "local"


def _is_local(pair: Pair, judgement: Judgement, found: Inheritance) -> bool:
    """Certainly: the added share alone is beyond the limit, or nothing explains the error."""
    if found.basis == "measured" and judgement.excess < math.inf:
        return judgement.excess * found.local >= pair.error
    return pair.error > found.most


def _short(value: float) -> str:
    return f"{value:.3g}"
