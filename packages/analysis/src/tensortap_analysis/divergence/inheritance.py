"""How much of a tensor's error comes from the errors of what it was computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tensortap_analysis.divergence.modules import Tensor
from tensortap_analysis.divergence.upstream import Sources
from tensortap_analysis.judging.noise import usable
from tensortap_analysis.pairs.pair import Pair

Basis = Literal["measured", "noise", "expected", "statistics"]
"""How inherited was told from local: see `Inheritance`."""

_AMPLIFIED = 4.0
"""What a layer may make of a relative error without being suspected, where no noise tells.

Llama models in bfloat16 were seen to amplify the error of one tensor to the next by up to 2.6.
"""
_SUMMED = 16.0
"""The same of a parameter's gradient: a sum over all tokens, whose terms cancel each other.

In a Mamba the gradient of a bias was seen to amplify the error of what it was made of by 7.
"""
_MARGIN = 2.0
"""The same where a noise run tells: on top of what became of its error, which went another way."""
CLEAR = 1.5
"""So many times the expected error is no amplification: the ratio that noise is allowed as well."""


@dataclass(frozen=True, slots=True)
class Inheritance:
    """What the inputs' errors make of a tensor, relative to it.

    `inherited` is what is to be expected, `most` what they can explain at all. `local` is the
    error that was added. By `basis`: `measured`, the run's own inputs were put through the same
    product; `noise`, errors are amplified as those of the noise run were; `expected`, they are
    passed on as they are, which random errors are by products with a matrix, and by residual
    streams; `statistics`, only the least of an error is known, and inherited from local cannot be
    told where an input differs.
    """

    inherited: float
    most: float
    local: float
    basis: Basis


def inheritance(pair: Pair, sources: Sources, pairs: Sequence[Pair]) -> Inheritance:
    """What the errors of `sources`, places in `pairs`, make of this pair's."""
    given = [pairs[place] for place in sources.places]
    if any(one.by == "statistics" and not one.equal for one in given):
        return Inheritance(pair.error, math.inf, 0.0, "statistics")
    most = max((_most(pair, one) for one in given), default=0.0)
    if pair.passed is not None:
        return Inheritance(pair.passed.inherited, most, pair.passed.local, "measured")
    gain = _gain_of_noise(pair, sources, pairs)
    basis: Basis = "expected" if gain is None else "noise"
    made = _made(sources, lambda place: pairs[place].error) * (1.0 if gain is None else gain)
    inherited = max([made, *(pairs[place].error for place in sources.through)])
    return Inheritance(min(inherited, pair.error), most, beyond(pair.error, inherited), basis)


def _most(pair: Pair, given: Pair) -> float:
    """The error of `pair` that the error of one input can make."""
    if given.error == 0:
        return 0.0
    noise, beside = usable(pair), usable(given)
    if noise is None or beside is None or not _known(noise.error, beside.error):
        summed = Tensor.of(pair.name).phase == "grad"
        return (_SUMMED if summed else _AMPLIFIED) * given.error
    return _MARGIN * max(1.0, noise.error / beside.error) * given.error


def _gain_of_noise(pair: Pair, sources: Sources, pairs: Sequence[Pair]) -> float | None:
    """What became of the noise run's errors on the way; `None` where it does not tell.

    At least 1: what is rounded anew at each token averages out where a fault does not.
    """
    noise = usable(pair)
    beside = {place: usable(pairs[place]) for place in (*sources.factors, *sources.beside)}
    if noise is None or not beside or None in beside.values():
        return None
    errors = {place: one.error for place, one in beside.items() if one is not None}
    given = _made(sources, lambda place: errors[place])
    return max(1.0, noise.error / given) if _known(noise.error, given) else None


def _known(*errors: float) -> bool:
    return all(0 < error < math.inf for error in errors)


def _made(sources: Sources, error: Callable[[int], float]) -> float:
    """The error that a module makes of independent ones, passed on as they are."""
    beside = max(map(error, sources.beside), default=0.0)
    return math.hypot(beside, *map(error, sorted(set(sources.factors))))


def beyond(error: float, inherited: float) -> float:
    """What is missing between two independent errors: error² = inherited² + local²."""
    if error <= inherited:
        return 0.0
    return math.sqrt(error - inherited) * math.sqrt(error + inherited)
