"""What statistics say about a difference that nobody can see any more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tensortap.records import Statistics, TensorRecord
from tensortap_analysis.metrics import ErrorHistogram, Metrics, Octaves, Side
from tensortap_analysis.pairs import Bounds

_NOTHING = Octaves({}, 0, {})
_COUNTS = ("nan", "posinf", "neginf")
_NUMBERS = ("min", "max", "absmax", "mean", "std", "rms", "l1", "l2")
_ROUNDING = 1e-12
"""Statistics are sums in another order on each device; this much of them is not a difference."""


def bounds_of(one: Statistics, two: Statistics, *, elementwise: bool) -> Bounds:
    """How far apart two tensors of one size must be, by their statistics.

    `elementwise`: the leading values stand at the same places on both sides.
    """
    rms = _apart(one, two, ("mean", "std", "rms"))
    largest = _apart(one, two, ("mean", "std", "rms", "min", "max", "absmax"))
    if elementwise:
        gaps = [abs(b - a) for a, b in zip(one.first, two.first, strict=False)]
        finite = [gap for gap in gaps if math.isfinite(gap)]
        largest = max([largest, *finite])
        rms = max(rms, math.sqrt(math.fsum(gap * gap for gap in finite) / max(one.count, 1)))
    nonfinite = any(getattr(one, key) != getattr(two, key) for key in _COUNTS)
    same = not nonfinite and one.zero == two.zero and rms == largest == 0
    same = same and all(getattr(one, key) == getattr(two, key) for key in _NUMBERS)
    relative = rms / one.rms if one.rms else (math.inf if rms else 0.0)
    return Bounds(rms, largest, relative, nonfinite, same)


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


def merged(records: Sequence[TensorRecord]) -> Statistics | str:
    """The statistics of the logical tensor from those of its pieces, or why they do not tell them.

    Copies of a piece count once. The leading values are kept where one piece is the whole.
    """
    if any(record.stats is None for record in records):
        return "it has neither values nor statistics"
    places = [record.placement for record in records]
    scattered = any(place is not None and (place.unknown or place.partial) for place in places)
    if scattered and len(records) > 1:
        return "statistics of pieces that must be summed, or have no place, do not merge"
    distinct: dict[object, Statistics] = {}
    for record in records:
        place = record.placement
        key = sorted(place.segments.items()) if place is not None else []
        assert record.stats is not None
        distinct.setdefault(tuple(key), record.stats)
    pieces = list(distinct.values())
    if len(pieces) == 1:
        return pieces[0]
    whole = records[0].placement
    if whole is None or sum(p.count for p in pieces) != math.prod(whole.logical_shape):
        return "statistics of pieces that overlap, or are not all there, do not merge"
    return _merged(pieces)


def _merged(pieces: Sequence[Statistics]) -> Statistics:
    """Population statistics of disjoint pieces together (Chan, Golub and LeVeque, 1979)."""
    some = [piece for piece in pieces if piece.finite]
    counts = {
        key: sum(getattr(piece, key) for piece in pieces)
        for key in ("count", "nan", "posinf", "neginf", "zero")
    }
    if not some:
        return replace(pieces[0], **counts, first=(), exponents=None)
    n = sum(piece.finite for piece in some)
    mean = math.fsum(_of(piece.mean) * (piece.finite / n) for piece in some)
    spread = math.fsum(
        (piece.finite / n) * (_of(piece.std) ** 2 + (_of(piece.mean) - mean) ** 2) for piece in some
    )
    return Statistics(
        **counts,
        min=min(_of(piece.min) for piece in some),
        max=max(_of(piece.max) for piece in some),
        absmax=max(_of(piece.absmax) for piece in some),
        mean=mean,
        std=math.sqrt(spread),
        rms=math.hypot(*(_of(piece.rms) * math.sqrt(piece.finite / n) for piece in some)),
        l1=math.fsum(_of(piece.l1) for piece in some),
        l2=math.hypot(*(_of(piece.l2) for piece in some)),
    )


def _of(value: float | None) -> float:
    assert value is not None
    return value
