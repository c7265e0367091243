"""`Facts`: what several measures ask of one matrix, found once, when it is first asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from tensortap.records import Statistics
from tensortap.stats import statistics
from tensortap_analysis.weights.measures.codes import Codes, few
from tensortap_analysis.weights.measures.elements import Elements, by_kernel, elements
from tensortap_analysis.weights.measures.pieces import cut
from tensortap_analysis.weights.measures.rows import Rows, rows
from tensortap_analysis.weights.measures.units import BIG, unit_of
from tensortap_analysis.weights.measures.values import Values, finite

NEAR_ZERO = 1e-3
"""Near zero is what is at most this times the root mean square of the matrix."""
_TINY = 2.0**-100
"""Scales of matrices with nothing larger are no normal numbers of float32."""

ALL_ZERO = "all values are 0"
BEYOND = "larger than any number of float64"


class Facts:
    """A contiguous 2-d matrix, the dtype its values were stored in, and what is known of both."""

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype) -> None:
        self.matrix, self.dtype = matrix, dtype

    @cached_property
    def statistics(self) -> Statistics:
        """Of the finite values; counts of the others."""
        return statistics(self.matrix) if self._codes is None else self._codes.statistics

    @cached_property
    def exponents(self) -> Mapping[int, int]:
        """How many nonzero finite values have each power of two."""
        if self._codes is not None:
            return self._codes.exponents
        return statistics(self.matrix, exponents=True).exponents or {}

    @cached_property
    def unit(self) -> float:
        """A power of two; values times this have squares inside the range of float64."""
        if self.matrix.dtype is not torch.float64:
            return 1.0
        return unit_of(self.statistics.absmax or 0.0)

    @property
    def extreme(self) -> str | None:
        """Why values at the ends of their dtype cannot be rounded to formats, or `None`."""
        largest = self.statistics.absmax
        wide = self.matrix.dtype is torch.float64
        if not largest or (1 / BIG <= largest <= BIG if wide else largest >= _TINY):
            return None
        return f"its largest value is {largest:.3g}: scales of formats would be lost"

    def scaled(self) -> Facts:
        """The same values times a power of two, so that the largest is about 1, if `extreme`.

        Not kept: facts that know themselves would keep the matrix.
        """
        if self.extreme is None:
            return self
        power = -math.frexp(self.statistics.absmax or 1.0)[1]
        # In two steps: 2^1074 itself is no number.
        return Facts(
            (self.matrix * 2.0 ** (power // 2)).mul_(2.0 ** (power - power // 2)), self.dtype
        )

    @property
    def rows(self) -> Rows:
        """Row by row; sums are in `unit`."""
        return self._survey[0]

    @property
    def _codes(self) -> Codes | None:
        return self._survey[1] if few(self.matrix.dtype) else None

    @cached_property
    def _survey(self) -> tuple[Rows, Codes | None]:
        """One pass over the matrix."""
        codes = Codes(self.matrix.dtype) if few(self.matrix.dtype) else None
        return rows(self.matrix, self.unit, codes), codes

    @property
    def distinct(self) -> Values | None:
        """Values that occur and how often, of dtypes with few of them; else `None`."""
        return None if self._codes is None else self._codes.values

    @property
    def values(self) -> Iterator[Values]:
        """All finite values, one after the other or those that occur with their counts."""
        if self.distinct is not None:
            yield self.distinct
        else:
            yield from map(finite, cut(self.matrix))

    @cached_property
    def near_zero(self) -> float:
        """The magnitude up to which a value counts as near zero."""
        return NEAR_ZERO * (self.statistics.rms or 0.0)

    @cached_property
    def elements(self) -> Elements:
        """What is counted of values one by one."""
        found = self.statistics
        known = found.mean or 0.0, found.std or 0.0, self.near_zero
        return by_kernel(self.matrix, *known) or elements(self.values, *known)

    @property
    def empty(self) -> str | None:
        """Why nothing can be computed at all."""
        return None if self.matrix.numel() else "no element"

    @property
    def not_finite(self) -> str | None:
        """`"not finite: 3 NaN, 1 infinite"`, or `None` where all values are."""
        found = self.statistics
        infinite = found.posinf + found.neginf
        if not found.nan + infinite:
            return None
        counts = ((found.nan, "NaN"), (infinite, "infinite"))
        words = [f"{count:,} {word}" for count, word in counts if count]
        return f"not finite: {', '.join(words)}"

    @property
    def all_zero(self) -> str | None:
        """Why ratios do not exist: there is no value to divide by."""
        return ALL_ZERO if not self.statistics.absmax else None

    @property
    def unusable(self) -> str | None:
        """Why metrics that need every value to be a number do not exist."""
        return self.empty or self.not_finite


def nothing(names: Iterable[str], reason: str) -> dict[str, Any]:
    """Metrics that do not exist, and why."""
    names = list(names)
    return dict.fromkeys(names) | {"unresolved": dict.fromkeys(names, reason)}


def overflown(lengths: Mapping[str, float | None]) -> dict[str, str]:
    """Norms of finite values that are infinite all the same, and why."""
    return {name: BEYOND for name, length in lengths.items() if length == math.inf}


def ratio(numerator: float, denominator: float) -> float | None:
    """`None` for 0 / 0, infinite for anything else over 0."""
    if denominator:
        return numerator / denominator
    return math.inf if numerator else None
