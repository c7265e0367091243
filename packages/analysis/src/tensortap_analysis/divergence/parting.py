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

Origin = Literal["local", "inherited"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A tensor beyond its limit, the errors of what it was computed from, and what that explains.

    All errors are relative (L2 of the difference over L2 of the reference). `origin` is what is
    certain: `local` where the inputs' errors cannot explain the error. `inherited` is what they
    are expected to make of it, `local` what was added here, by `basis` (see `Inheritance`).
    `known` is false where not everything that the module was given was compared.
    """

    pair: Pair
    judgement: Judgement
    inputs: tuple[Pair, ...]
    error: float
    inherited: float
    local: float
    origin: Origin
    basis: Basis
    known: bool = True

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
        clear = forward and estimated and self.error > CLEAR * self.inherited
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
    if math.isinf(found.error):
        return "first seen here" if found.origin == "local" else "inherited"
    if found.basis == "statistics":
        return "inherited or added here: statistics do not tell"
    about = "" if found.basis == "measured" or not found.inherited else "about "
    return f"{found.origin}: {about}{_short(found.local)} added here"


def _beside(found: Divergence) -> str:
    """The inputs and their errors, or why there are none."""
    tensor = Tensor.of(found.name)
    worst = sorted((p for p in found.inputs if p.error > 0), key=lambda p: -p.error)[:3]
    if worst:
        return "its inputs: " + ", ".join(f"{p.name} {_short(p.error)}" for p in worst)
    if tensor.is_from_outside:
        return "the runs were given other data"
    if tensor.phase == "param":
        return "the weights differ"
    if not found.known:
        return "what it was computed from was not all captured"
    return "nothing it was computed from differs"


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
                found = inheritance(pairs[one], sources[one], pairs)
                given = tuple(pairs[at] for at in sources[one].places)
                yield _divergence(pairs[one], judgements[one], found, given, sources[one].known)


def _divergence(
    pair: Pair, judgement: Judgement, found: Inheritance, given: tuple[Pair, ...], known: bool
) -> Divergence:
    local = found.local if pair.error < math.inf else math.inf
    origin: Origin = "local" if _is_local(pair, judgement, found) else "inherited"
    if origin == "inherited" and math.isinf(pair.error):
        local = 0.0
    return Divergence(
        pair, judgement, given, pair.error, found.inherited, local, origin, found.basis, known
    )


def _is_local(pair: Pair, judgement: Judgement, found: Inheritance) -> bool:
    """Certainly: the added share alone is beyond the limit, or nothing explains the error."""
    if found.basis == "measured" and judgement.excess < math.inf:
        return judgement.excess * found.local >= pair.error
    return pair.error > found.most


def _short(value: float) -> str:
    return f"{value:.3g}"
