"""From the totals of all pairs to their metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tensortap.native.counts import Ints
from tensortap.native.totals import Frame, Moments, Totals
from tensortap_analysis.metrics.result import ErrorHistogram, Metrics, Octaves, Side
from tensortap_analysis.metrics.selection import percentile

PERCENTS = (50, 90, 95, 99)

_EPSILON = 1e-8
"""What the older scripts add to a denominator."""
_NOTHING = Side(None, None, None, None, None, None)
_BIAS = 1023


@dataclass(frozen=True, slots=True)
class Spread:
    """Differences of one kind: counts by sign and exponent, and the values of some ranks."""

    rows: Ints
    ranks: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Findings:
    """What the passes over the pairs leave: of differences, and of relative ones."""

    totals: Totals
    frame: Frame
    absolute: Spread
    relative: Spread


@dataclass(frozen=True, slots=True)
class Given:
    """What was compared: an element of `shape` holds `parts` values."""

    shape: tuple[int, ...]
    parts: int
    one_dtype: bool
    floats: bool


def report(found: Findings, given: Given) -> Metrics:
    """All metrics; what is undefined is `None`."""
    t = found.totals
    return Metrics(
        count=t.count, compared=t.compared,
        nan_ref=t.nan_ref, nan_other=t.nan_other, inf_ref=t.inf_ref, inf_other=t.inf_other,
        nonfinite_mismatches=t.mismatches, bitwise_equal=given.one_dtype and not t.unequal,
        error_histogram=_error_histogram(found),
        **(_metrics(found, given) if t.compared else _undefined()),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Values:
    """One side or the difference; mean and deviations in units of 1 / `unit`."""

    count: int
    unit: float
    number: Callable[[float], Any]
    lo: float
    hi: float
    mean: float
    m2: float

    @property
    def squares(self) -> float:
        """Their sum, in units."""
        return self.m2 + self.count * self.mean * self.mean

    @property
    def mean_square(self) -> Any:
        return self.number(self.squares) / self.number(self.unit) ** 2 / self.count

    @property
    def norm(self) -> Any:
        return self.number(math.sqrt(self.squares)) / self.number(self.unit)

    def side(self) -> Side:
        std, rms = (math.sqrt(x / self.count) / self.unit for x in (self.m2, self.squares))
        absmax = max(abs(self.lo), abs(self.hi))
        return Side(self.mean / self.unit, std, self.lo, self.hi, rms, absmax)


def _number(frame: Frame) -> Callable[[float], Any]:
    """What holds squares: float64 may be too narrow for them where it is for those of units."""
    plain = frame.ref == frame.other == frame.difference == frame.half == 1
    return float if plain else Fraction


def _metrics(found: Findings, given: Given) -> dict[str, Any]:
    t, f, n, number = found.totals, found.frame, found.totals.compared, _number(found.frame)

    def values(m: Moments, unit: float, origin: float, half: float = 1.0) -> _Values:
        return _Values(n, unit * half, number, m.lo / half, m.hi / half, origin + m.mean, m.m2)

    ref, other = values(t.ref, f.ref, f.ref_origin), values(t.other, f.other, f.other_origin)
    difference = values(t.difference, f.difference, f.difference_origin, f.half)
    element = np.unravel_index(t.at // given.parts, given.shape)
    ulps = given.one_dtype and given.floats
    return {
        "ref": ref.side(),
        "other": other.side(),
        "difference": difference.side(),
        "max_abs": t.largest / f.half,
        "max_abs_at": tuple(int(place) for place in element),
        "relative_max": t.relative_max,
        "relative_mean": t.relative_sum / n,
        "relative_median": percentile(found.relative.ranks, n, 50),
        "ulp_max": t.ulp_max if ulps else None,
        "ulp_mean": t.ulp_sum / n if ulps else None,
        "percentiles": {p: percentile(found.absolute.ranks, n, p) / f.half for p in PERCENTS},
        **_errors(t, f, ref, difference),
        **_agreement(t, ref, other, difference),
    }


def _errors(t: Totals, f: Frame, ref: _Values, difference: _Values) -> dict[str, float]:
    number, mse = ref.number, difference.mean_square
    mae = number(t.abs_difference) / number(difference.unit) / t.compared
    size = number(t.abs_ref) / number(f.ref) / t.compared
    return {
        "mse": _float(mse),
        "rmse": math.sqrt(difference.squares / t.compared) / difference.unit,
        "mae": _float(mae),
        "relative_mse": _float(mse / (ref.mean_square + number(_EPSILON))),
        "relative_mae": _float(mae / (size + number(_EPSILON))),
    }


def _agreement(
    t: Totals, ref: _Values, other: _Values, difference: _Values
) -> dict[str, float | None]:
    constant, zero = 0.0 in (ref.m2, other.m2), 0.0 in (ref.squares, other.squares)
    product = t.comoment + t.compared * ref.mean * other.mean
    return {
        "relative_l2": _float(difference.norm / ref.norm) if ref.squares else None,
        "cosine": None if zero else _cosine(product, ref.squares, other.squares),
        "correlation": None if constant else _cosine(t.comoment, ref.m2, other.m2),
        "sqnr_db": _decibels(ref, difference),
    }


def _cosine(product: float, one: float, two: float) -> float:
    return max(-1.0, min(1.0, product / (math.sqrt(one) * math.sqrt(two))))


def _decibels(signal: _Values, noise: _Values) -> float:
    if not noise.squares:
        return math.inf
    if not signal.squares:
        return -math.inf
    powers = math.log10(signal.squares) - math.log10(noise.squares)
    return 10 * (powers - 2 * (math.log10(signal.unit) - math.log10(noise.unit)))


def _float(value: float | Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _undefined() -> dict[str, Any]:
    names = (
        "mse", "rmse", "mae", "max_abs", "max_abs_at", "relative_mse", "relative_mae",
        "relative_max", "relative_mean", "relative_median", "relative_l2", "cosine",
        "correlation", "sqnr_db", "ulp_max", "ulp_mean",
    )  # fmt: skip
    sides = dict.fromkeys(("ref", "other", "difference"), _NOTHING)
    return {**dict.fromkeys(names), **sides, "percentiles": {}}


def _error_histogram(found: Findings) -> ErrorHistogram:
    zero, shift = found.totals.zero, 1 if found.frame.half == 0.5 else 0
    return ErrorHistogram(
        _octaves(found.absolute.rows, zero, shift), _octaves(found.relative.rows, zero, 0)
    )


def _octaves(rows: Ints, zero: int, shift: int) -> Octaves:
    """From counts by sign and exponent, `zero` among them; `shift` exponents are added."""
    counts = rows.copy()
    counts[0, 0] -= zero
    places = counts.nonzero()
    sides: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for sign, row, times in zip(*(x.tolist() for x in (*places, counts[places])), strict=True):
        sides[sign][row - _BIAS + shift] = times
    positive, negative = sides
    return Octaves(negative, zero, positive)
