"""Where two runs part: errors that a layer adds, told from those that it inherits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tensortap_analysis.pairs import Pair
from tensortap_analysis.presets import Judgement
from tensortap_analysis.upstream import upstream

Origin = Literal["local", "inherited"]

_AMPLIFIED = 4.0
"""What a layer may make of a relative error without being suspected, where no noise tells.

Llama models in bfloat16 were seen to amplify the error of one tensor to the next by up to 2.6.
"""
_MARGIN = 2.0
"""The same on top of what the layer made of the noise run's error, which went another way."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A tensor beyond its limit, the errors of what it was computed from, and what that explains.

    All errors are relative (L2 of the difference over L2 of the reference). `inherited` is the
    most that the inputs' errors explain of `error`, `local` the least that was added here:
    error**2 = inherited**2 + local**2.
    """

    pair: Pair
    judgement: Judgement
    inputs: tuple[Pair, ...]
    error: float
    inherited: float
    local: float

    @property
    def name(self) -> str:
        """Canonical name of the tensor."""
        return self.pair.name

    @property
    def origin(self) -> Origin:
        """`local` where more was added here than inherited."""
        return "local" if self.local > self.inherited else "inherited"

    def __str__(self) -> str:
        inputs = ", ".join(f"{p.name} {_short(p.error)}" for p in self._worst_inputs())
        beside = f"; its inputs: {inputs}" if inputs else "; nothing it was computed from differs"
        return (
            f"{self.name} ({self.pair.at.when}): relative error {_short(self.error)}, "
            f"{self.judgement.grade}; {self.origin}: at least {_short(self.local)} added here"
            f"{beside}"
        )

    def _worst_inputs(self) -> list[Pair]:
        differing = [pair for pair in self.inputs if pair.error > 0]
        return sorted(differing, key=lambda pair: -pair.error)[:3]


def divergences(pairs: Sequence[Pair], judgements: Sequence[Judgement]) -> Iterator[Divergence]:
    """Every tensor beyond its limit, in execution order, with what its inputs explain."""
    for pair, judgement, sources in zip(pairs, judgements, upstream(pairs), strict=True):
        if not judgement.within:
            yield _divergence(pair, judgement, tuple(pairs[place] for place in sources))


def _divergence(pair: Pair, judgement: Judgement, inputs: tuple[Pair, ...]) -> Divergence:
    error = pair.error
    explained = max((_explained(pair, given) for given in inputs), default=0.0)
    if error <= explained:
        return Divergence(pair, judgement, inputs, error, error, 0.0)
    local = error if math.isinf(error) else math.sqrt(error**2 - explained**2)
    return Divergence(pair, judgement, inputs, error, explained, local)


def _explained(pair: Pair, given: Pair) -> float:
    """The error of `pair` that the error of one input can make."""
    if given.error == 0:
        return 0.0
    noise, noise_given = pair.noise, given.noise
    if noise is None or noise_given is None or not 0 < noise_given.error < math.inf:
        return _AMPLIFIED * given.error
    return _MARGIN * max(1.0, noise.error / noise_given.error) * given.error


def _short(value: float) -> str:
    return f"{value:.3g}"
