"""The passes over the pairs in numpy: the reference, and what runs without a compiled kernel.

What is counted or selected is the same as the kernel's, sums but for their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from tensortap.native.codes import code_table
from tensortap.native.comparing import (
    KEY_SHIFT,
    KEYS,
    NEXT_BITS,
    ROWS,
    Frame,
    Histogram,
    Histograms,
    Moments,
    Quest,
    Totals,
)
from tensortap_analysis.metrics.pairs import codes_of, value_count, values_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_PIECE = 1 << 16
"""Pairs computed at once, even: what stays in a core's cache."""
_EPSILON = 1e-8
_MAGNITUDE = np.int64((1 << 63) - 1)
_SIGNED = {2: (np.int16, 0x7FFF), 4: (np.int32, 0x7FFFFFFF), 8: (np.int64, (1 << 63) - 1)}


class Plain:
    """The engine without compiled code."""

    threads = 1

    def first(self, ref: torch.Tensor, other: torch.Tensor) -> tuple[float, float] | None:
        for one, two in _pieces(ref, other):
            r, o = values_of(one), values_of(two)
            finite = np.flatnonzero(np.isfinite(r) & np.isfinite(o))
            if len(finite):
                return float(r[finite[0]]), float(o[finite[0]])
        return None

    def add(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        totals: Totals,
        histograms: Histograms,
    ) -> None:
        with np.errstate(all="ignore"):
            for one, two in _pieces(ref, other):
                merge(totals, _piece(one, two, frame, totals.count, histograms))

    def select(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        absolute: Quest | None,
        relative: Quest | None,
    ) -> None:
        with np.errstate(all="ignore"):
            for one, two in _pieces(ref, other):
                r, o = values_of(one), values_of(two)
                finite = np.isfinite(r) & np.isfinite(o)
                apart, relatives = _differences(r[finite], o[finite], frame)
                for quest, x in ((absolute, apart), (relative, relatives)):
                    if quest is not None:
                        _pursue(quest, np.abs(x).view(np.int64))


def merge(all_: Totals, more: Totals) -> None:
    """Add `more` to `all_` (Chan, Golub and LeVeque, 1979); the kernel's `merge_totals`."""
    before, added = all_.compared, more.compared
    if added:
        gaps = (more.ref.mean - all_.ref.mean) * (more.other.mean - all_.other.mean)
        all_.comoment += gaps * (before * (added / (before + added)))
        for side in ("ref", "other", "difference"):
            _merge_moments(getattr(all_, side), before, getattr(more, side), added)
    if more.largest > all_.largest:
        all_.largest, all_.at = more.largest, more.at
    for name in ("relative_max", "ulp_max"):
        setattr(all_, name, max(getattr(all_, name), getattr(more, name)))
    for name in (*Totals.COUNTERS, *Totals.SUMS):
        setattr(all_, name, getattr(all_, name) + getattr(more, name))


def _merge_moments(all_: Moments, before: int, more: Moments, added: int) -> None:
    share, gap = added / (before + added), more.mean - all_.mean
    all_.m2 += more.m2 + gap * gap * (before * share)
    all_.mean += gap * share
    all_.lo, all_.hi = min(all_.lo, more.lo), max(all_.hi, more.hi)


def _pieces(ref: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    widths = [max(1, value_count(x[:1])) for x in (ref, other)]  # a packed element has two
    pieces = (torch.split(x, _PIECE // w) for x, w in zip((ref, other), widths, strict=True))
    yield from zip(*pieces, strict=True)


def _piece(
    ref: torch.Tensor, other: torch.Tensor, frame: Frame, first: int, histograms: Histograms
) -> Totals:
    totals = Totals.none()
    r, o = values_of(ref), values_of(other)
    finite = np.isfinite(r) & np.isfinite(o)
    totals.count, totals.compared = len(r), int(finite.sum())
    totals.unequal = int(ref.dtype != other.dtype or not _same_bits(ref, other))
    _count_odd(r[~finite], o[~finite], totals)
    places = np.flatnonzero(finite)
    if len(places):
        _add_finite(r[places], o[places], frame, totals, histograms)
        apart, _ = _differences(r[places], o[places], frame)
        totals.at = first + int(places[np.argmax(np.abs(apart))])
        _add_ulps(ref, other, places, totals)
    return totals


def _same_bits(ref: torch.Tensor, other: torch.Tensor) -> bool:
    one, two = (x.view(torch.uint8).numpy() for x in (ref, other))
    return bool(np.array_equal(one, two))


def _count_odd(ref: Floats, other: Floats, totals: Totals) -> None:
    totals.nan_ref, totals.nan_other = int(np.isnan(ref).sum()), int(np.isnan(other).sum())
    totals.inf_ref, totals.inf_other = int(np.isinf(ref).sum()), int(np.isinf(other).sum())
    totals.mismatches = int((~(np.isnan(ref) & np.isnan(other)) & (ref != other)).sum())


def _differences(ref: Floats, other: Floats, frame: Frame) -> tuple[Floats, Floats]:
    """`other - ref` and that over |ref| + 1e-8, both in units of `half`."""
    apart = other * frame.half - ref * frame.half + 0.0  # -0.0 would be a second kind of nothing
    relative = np.abs(apart) / (np.abs(ref) * frame.half + _EPSILON * frame.half)
    return apart, np.copysign(relative, apart)


def _add_finite(
    ref: Floats, other: Floats, frame: Frame, totals: Totals, histograms: Histograms
) -> None:
    apart, relative = _differences(ref, other, frame)
    wide = apart * frame.difference
    r, o = ref * frame.ref, other * frame.other
    totals.ref = _moments(ref, r, frame.ref_origin)
    totals.other = _moments(other, o, frame.other_origin)
    totals.difference = _moments(apart, wide, frame.difference_origin)
    centred = (r - r[0]) - (r - r[0]).mean()
    totals.comoment = float((centred * (o - o[0])).sum())  # a BLAS product would wake its threads
    totals.abs_ref, totals.abs_difference = float(np.abs(r).sum()), float(np.abs(wide).sum())
    totals.largest, totals.zero = float(np.abs(apart).max()), int((apart == 0).sum())
    totals.relative_max = float(np.abs(relative).max())
    totals.relative_sum = float(np.abs(relative).sum())
    _count(apart, histograms.absolute)
    _count(relative, histograms.relative)


def _count(x: Floats, histogram: Histogram) -> None:
    keys = (x.view(np.uint64) >> np.uint64(KEY_SHIFT)).astype(np.int64)
    for sign in range(2):
        mine = keys[keys // KEYS == sign] - sign * KEYS
        if not len(mine):
            continue
        first = int(mine.min())
        times = np.bincount(mine - first)
        histogram.keys[sign].reshape(-1)[first : first + len(times)] += times
        rows = np.bincount(mine // (KEYS // ROWS))
        histogram.rows[sign, : len(rows)] += rows


def _moments(values: Floats, scaled: Floats, origin: float) -> Moments:
    deviation = scaled - scaled[0]
    mean = deviation.mean()
    m2 = ((deviation - mean) ** 2).sum()
    return Moments(values.min() + 0.0, values.max() + 0.0, (scaled[0] - origin) + mean, m2)


def _add_ulps(ref: torch.Tensor, other: torch.Tensor, places: Ints, totals: Totals) -> None:
    if ref.dtype != other.dtype or not ref.dtype.is_floating_point:
        return
    # As unsigned numbers a distance of up to 2^64 wraps around to itself.
    one, two = (_order(x)[places] for x in (ref, other))
    far = np.where(one > two, one.view(np.uint64) - two.view(np.uint64),
                   two.view(np.uint64) - one.view(np.uint64))  # fmt: skip
    totals.ulp_max, totals.ulp_sum = int(far.max()), float(far.astype(np.float64).sum())


def _order(block: torch.Tensor) -> Ints:
    """Where each value stands among those of its dtype; the two zeros are one."""
    table = code_table(block.dtype)
    if table is not None:
        assert table.order is not None
        return table.order[codes_of(block)]
    word, magnitude = _SIGNED[block.element_size()]
    bits = block.view(getattr(torch, np.dtype(word).name)).numpy().astype(np.int64)
    return np.where(bits < 0, -(bits & magnitude), bits & magnitude)


def _pursue(quest: Quest, bits: Ints) -> None:
    keys = bits >> quest.shift
    bits = bits[np.isin(keys, np.asarray(quest.prefixes, dtype=np.int64))]
    if quest.found is not None:
        quest.found[quest.taken : quest.taken + len(bits)] = bits
        quest.taken += len(bits)
        return
    width = min(quest.shift, NEXT_BITS)
    below = bits >> (quest.shift - width) & ((1 << width) - 1)
    for row, prefix in enumerate(quest.prefixes):
        mine = bits >> quest.shift == prefix
        np.add.at(quest.counts[0, row], below[mine], 1)
        np.bitwise_or.at(quest.ones[0, row], below[mine], bits[mine])
        np.bitwise_or.at(quest.zeros[0, row], below[mine], ~bits[mine])
