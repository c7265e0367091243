"""What statistics say about a difference that nobody can see any more."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tensortap.records import Statistics
from tensortap_analysis.metrics import ErrorHistogram, Metrics, Octaves, Side
from tensortap_analysis.pairs.pair import Bounds

_NOTHING = Octaves({}, 0, {})
_COUNTS = ("nan", "posinf", "neginf")
_NUMBERS = ("min", "max", "absmax", "mean", "std", "rms", "l1", "l2")
_ROUNDING = 1e-12
"""Statistics are sums in another order on each device; this much of them is not a difference."""


def bounds_of(one: Statistics, two: Statistics, *, elementwise: bool) -> Bounds:
    """How far apart two tensors of one size must be, by their statistics.

    `elementwise`: the leading values stand at the same places on both sides. NaN and infinities
    may stand at other places on each side, so that statistics of the rest are of other elements:
    where there are any, only their numbers count.
    """
    first = [*zip(one.first, two.first, strict=False)] if elementwise else []
    nonfinite = any(getattr(one, key) != getattr(two, key) for key in _COUNTS)
    nonfinite |= not all(_alike(a, b) for a, b in first if not math.isfinite(a + b))
    same = not nonfinite and _same(one, two) and all(_alike(a, b) for a, b in first)
    if one.finite < one.count or two.finite < two.count:
        return Bounds(0.0, 0.0, 0.0, nonfinite, same)
    gaps = [abs(b - a) for a, b in first]
    rms = math.hypot(*gaps) / math.sqrt(max(one.count, 1))
    rms = max(rms, _apart(one, two, ("mean", "std", "rms")))
    largest = _apart(one, two, ("mean", "std", "rms", "min", "max", "absmax"))
    relative = rms / one.rms if one.rms else (math.inf if rms else 0.0)
    return Bounds(rms, max([largest, *gaps]), relative, nonfinite, same)


def _alike(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _same(one: Statistics, two: Statistics) -> bool:
    """Is every number the same, up to the order in which it was summed?"""
    size = max(one.absmax or 0.0, two.absmax or 0.0)
    for name in _NUMBERS:
        a, b = getattr(one, name), getattr(two, name)
        if (a is None) != (b is None):
            return False
        if a is not None and abs(b - a) > _ROUNDING * max(size, abs(a)):
            return False
    return (one.count, one.zero) == (two.count, two.zero)


def _apart(one: Statistics, two: Statistics, names: Sequence[str]) -> float:
    size = max(one.absmax or 0.0, two.absmax or 0.0)
    gaps = [0.0]
    for name in names:
        a, b = getattr(one, name), getattr(two, name)
        if a is not None and b is not None and abs(b - a) > _ROUNDING * size:
            gaps.append(abs(b - a))
    return max(gaps)


def said(one: Statistics, two: Statistics) -> Metrics:
    """What each side says of itself, as metrics without any difference."""
    return Metrics(
        count=one.count, compared=min(one.finite, two.finite), nan_ref=one.nan, nan_other=two.nan,
        inf_ref=one.posinf + one.neginf, inf_other=two.posinf + two.neginf,
        nonfinite_mismatches=0, ref=_side(one), other=_side(two),
        difference=Side(None, None, None, None, None, None), mse=None, rmse=None, mae=None,
        max_abs=None, max_abs_at=None, relative_mse=None, relative_mae=None, relative_max=None,
        relative_mean=None, relative_median=None, relative_l2=None, cosine=None, correlation=None,
        sqnr_db=None, ulp_max=None, ulp_mean=None, percentiles={}, bitwise_equal=False,
        error_histogram=ErrorHistogram(_NOTHING, _NOTHING),
    )  # fmt: skip


def _side(found: Statistics) -> Side:
    return Side(found.mean, found.std, found.min, found.max, found.rms, found.absmax)
