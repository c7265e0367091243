"""Tensors of codes of a byte or less: all there is to know from how often each pair occurs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tensortap.native.codes import CodeTable, code_table
from tensortap.native.counts import ROW_SHIFT, ROWS, CodePairs
from tensortap.native.totals import Frame, Totals
from tensortap_analysis.metrics.cells import Cells, Floats, Ints, add_finite, add_odd, add_ulps
from tensortap_analysis.metrics.engines import Engine
from tensortap_analysis.metrics.pairs import BlockPair, codes_of
from tensortap_analysis.metrics.passes import require_values
from tensortap_analysis.metrics.report import PERCENTS, Findings, Spread
from tensortap_analysis.metrics.selection import percentile_ranks

_FEW = 1 << 14
"""Values from which on a table of all pairs of codes is worth its size."""
Tables = tuple[CodeTable, CodeTable]
"""What the codes of both sides are worth."""


def tables_of(pair: BlockPair) -> Tables | None:
    """What the codes of both sides are worth; `None` where one of them has wider elements."""
    one, two = (code_table(x.dtype) for x in pair)
    return None if one is None or two is None else (one, two)


def counted(pairs: Iterable[BlockPair], tables: Tables, engine: Engine, values: int) -> Findings:
    """Totals and percentiles of `values` pairs of codes, in prepared blocks; a single pass."""
    codes, times, places = _few(pairs) if values < _FEW else _many(pairs, engine)
    require_values(int(times.sum()), values)
    with np.errstate(all="ignore"):
        return _findings(codes, times, places, tables)


def _few(pairs: Iterable[BlockPair]) -> tuple[Ints, Ints, Ints]:
    """The pairs of codes, how often each occurs, and where first: sorted, without a table."""
    joined = [codes_of(one).astype(np.uint16) << 8 | codes_of(two) for one, two in pairs]
    codes, places, times = np.unique(np.concatenate(joined), return_index=True, return_counts=True)
    return codes.astype(np.int64), times, places


def _many(pairs: Iterable[BlockPair], engine: Engine) -> tuple[Ints, Ints, Ints]:
    found = CodePairs(engine.threads)
    for one, two in pairs:
        engine.count(one, two, found)
    times = found.times.sum(axis=0)
    codes = np.flatnonzero(times)
    # What a thread has not seen stands after everything.
    places = np.where(found.times[:, codes], found.places[:, codes], found.total).min(axis=0)
    return codes, times[codes], places


def _findings(codes: Ints, times: Ints, places: Ints, tables: Tables) -> Findings:
    one, two = tables
    ref, other = codes >> 8, codes & 255
    cells = Cells(one.values[ref], two.values[other], times)
    finite, frame, totals = cells.finite, Frame(1, 1, 1, 1, 0, 0, 0), Totals.none()
    totals.count, totals.unequal = len(cells), int(one is not two or (ref != other).any())
    add_odd(cells.at(~finite), totals)
    cells = cells.at(finite)
    apart, relative = cells.differences(frame)
    if len(cells):
        add_finite(cells, apart, relative, frame, totals)
        totals.at = int(places[finite][np.abs(apart) == totals.largest].min())
    if len(cells) and one is two and one.order is not None:
        add_ulps(cells, one.order[ref[finite]], one.order[other[finite]], totals)
    times = times[finite]
    spreads = _spread(apart, times, PERCENTS), _spread(relative, times, (50,))
    return Findings(totals, frame, *spreads)


def _spread(x: Floats, times: Ints, percents: Sequence[int]) -> Spread:
    rows = np.zeros(2 * ROWS, dtype=np.int64)
    np.add.at(rows, x.view(np.int64) >> ROW_SHIFT & (2 * ROWS - 1), times)
    sizes, order = np.abs(x), np.argsort(np.abs(x))
    ranks = percentile_ranks(int(times.sum()), percents)
    at = np.searchsorted(times[order].cumsum(), ranks, side="right")
    known = dict(zip(ranks, sizes[order][at].tolist(), strict=True))
    return Spread(rows.reshape(2, ROWS), known)
