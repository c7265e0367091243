"""The passes over the pairs in numpy: the reference, and what runs without a compiled kernel.

What is counted or selected is the same as the kernel's, sums but for their rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tensortap.native.counts import (
    KEY_SHIFT,
    NEXT_BITS,
    PAIRS_OF_CODES,
    ROW,
    ROW_SHIFT,
    ROWS,
    CodePairs,
    Histogram,
    Histograms,
    Quest,
)
from tensortap.native.totals import Frame, Moments, Totals
from tensortap_analysis.metrics.cells import Cells, Floats, Ints, add_finite, add_odd, add_ulps
from tensortap_analysis.metrics.pairs import codes_of, value_count, values_of

_PIECE = 1 << 16
"""Pairs computed at once, even: what stays in a core's cache."""
_REST = (1 << KEY_SHIFT) - 1
_SIGNED = {2: (np.int16, 0x7FFF), 4: (np.int32, 0x7FFFFFFF), 8: (np.int64, (1 << 63) - 1)}


class Plain:
    """The engine without compiled code."""

    threads = 1

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
                merge(totals, _piece(one, two, frame, totals, histograms))

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
                cells = Cells(values_of(one), values_of(two))
                apart, relatives = cells.at(cells.finite).differences(frame)
                for quest, x in ((absolute, apart), (relative, relatives)):
                    if quest is not None:
                        _pursue(quest, np.abs(x).view(np.int64))

    def count(self, ref: torch.Tensor, other: torch.Tensor, pairs: CodePairs) -> None:
        for one, two in _pieces(ref, other):
            codes = codes_of(one).astype(np.int64) << 8 | codes_of(two)
            known = pairs.times[0] > 0
            # Of several that are written to one place the last one stays: here the first pair.
            first = np.zeros(PAIRS_OF_CODES, dtype=np.int64)
            first[codes[::-1]] = pairs.total + np.arange(len(codes))[::-1]
            np.copyto(pairs.places[0], first, where=~known)
            pairs.times[0] += np.bincount(codes, minlength=PAIRS_OF_CODES)
            pairs.total += len(codes)

    def change(self, ref: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
        with np.errstate(all="ignore"):
            found = [np.abs(values_of(two) - values_of(one)) for one, two in _pieces(ref, other)]
            sums = sum(float(far.sum()) for far in found)
            return float(np.max([far.max() for far in found if len(far)], initial=0.0)), sums


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
    ref: torch.Tensor, other: torch.Tensor, frame: Frame, before: Totals, histograms: Histograms
) -> Totals:
    totals = Totals.none()
    cells = Cells(values_of(ref), values_of(other))
    finite = cells.finite
    totals.count = len(cells)
    totals.unequal = int(ref.dtype != other.dtype or not _same_bits(ref, other))
    add_odd(cells.at(~finite), totals)
    places = np.flatnonzero(finite)
    if not len(places):
        return totals
    if not before.compared:
        _set_origins(float(cells.ref[places[0]]), float(cells.other[places[0]]), frame)
    cells = cells.at(finite)
    apart, relative = cells.differences(frame)
    add_finite(cells, apart, relative, frame, totals)
    totals.at = before.count + int(places[np.argmax(np.abs(apart))])
    if ref.dtype == other.dtype and ref.dtype.is_floating_point:
        add_ulps(cells, _order(ref)[places], _order(other)[places], totals)
    _count(apart, histograms.absolute)
    _count(relative, histograms.relative)
    return totals


def _set_origins(ref: float, other: float, frame: Frame) -> None:
    """From a value of the tensors: never farther from the mean than the farthest of them."""
    frame.ref_origin, frame.other_origin = ref * frame.ref, other * frame.other
    frame.difference_origin = (other * frame.half - ref * frame.half) * frame.difference


def _same_bits(ref: torch.Tensor, other: torch.Tensor) -> bool:
    one, two = (x.view(torch.uint8).numpy() for x in (ref, other))
    return bool(np.array_equal(one, two))


def _count(x: Floats, histogram: Histogram) -> None:
    bits = x.view(np.uint64)
    rows = (bits >> np.uint64(ROW_SHIFT)).astype(np.int64)
    histogram.rows += np.bincount(rows, minlength=2 * ROWS).reshape(histogram.rows.shape)
    if histogram.keys is None:
        return
    keys = (bits >> np.uint64(KEY_SHIFT)).astype(np.int64)
    keys += ((bits & np.uint64(_REST)) != 0) * (2 * ROWS * ROW)
    found, times = np.unique(keys, return_counts=True)
    histogram.keys.reshape(-1)[found] += times


def _order(block: torch.Tensor) -> Ints:
    """Where each value stands among those of its dtype; the two zeros are one."""
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
