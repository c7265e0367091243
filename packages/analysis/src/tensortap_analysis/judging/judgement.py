"""What a judgement is, and a preset: a way to judge pairs, with limits that can be replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tensortap_analysis.pairs.pair import Pair

Limits = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a pair is within its limits, and by how much.

    `excess` is the error in units of its limit: beyond where it is 1 or more, 0 for equal tensors,
    infinite for NaN or infinity on one side only. `grade` says it in words. `estimated`: the limit
    is an estimate of what rounding does, not a measured noise. `decided` is false where only
    statistics are known, which show nothing beyond the limits, and the preset needs values.
    """

    excess: float
    grade: str
    estimated: bool = False
    decided: bool = True

    @property
    def within(self) -> bool:
        """Is nothing seen that is beyond these limits?"""
        return self.excess < 1


@dataclass(frozen=True, slots=True)
class Preset:
    """A way to judge, and its thresholds, which can be replaced one by one.

    `judge` is given a pair that differs, the thresholds, and the relative error that rounding
    explains. `needs_values`: statistics can show that a pair is beyond, but not that it agrees.
    """

    name: str
    says: str
    limits: Limits
    judge: Callable[[Pair, Limits, float], Judgement]
    needs_values: bool = False
