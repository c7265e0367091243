"""The passes over pairs of values: sums and histograms, then the values of some ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tensortap.native.counts import Histograms, Quest
from tensortap.native.totals import Frame, Totals
from tensortap_analysis.metrics.engines import Engine
from tensortap_analysis.metrics.pairs import BlockPair
from tensortap_analysis.metrics.passes import Passes, require_values
from tensortap_analysis.metrics.report import PERCENTS, Findings, Spread
from tensortap_analysis.metrics.selection import Search, percentile_ranks, search

_BIG, _UNIT = 2.0**480, 2.0**600


def scanned(begun: Iterable[BlockPair], passes: Passes, engine: Engine, values: int) -> Findings:
    """Totals and percentiles of `values` pairs; `begun` is the first of the passes.

    Sums are taken in units that keep their squares in range, which may take a second pass.
    """
    sums = _added(begun, Frame(1, 1, 1, 1, 0, 0, 0), engine, values)
    require_values(sums.totals.count, values)
    fitting = _fitting(sums.totals) if sums.totals.compared else None
    if fitting is not None:
        sums = _added(passes, fitting, engine, values)
    seen, count = sums.histograms, sums.totals.compared
    absolute = Search.begun(seen.absolute, percentile_ranks(count, PERCENTS))
    relative = Search.begun(seen.relative, percentile_ranks(count, (50,)))

    def look(*quests: Quest | None) -> None:
        for ref, other in passes:
            engine.select(ref, other, sums.frame, *quests)

    search(look, absolute, relative, threads=engine.threads)
    spreads = Spread(seen.absolute.rows, absolute.found), Spread(seen.relative.rows, relative.found)
    return Findings(sums.totals, sums.frame, *spreads)


@dataclass(frozen=True, slots=True)
class _Sums:
    """What one pass adds up."""

    frame: Frame
    totals: Totals
    histograms: Histograms


def _added(pairs: Iterable[BlockPair], frame: Frame, engine: Engine, values: int) -> _Sums:
    sums = _Sums(frame, Totals.none(), Histograms(values))
    for ref, other in pairs:
        engine.add(ref, other, frame, sums.totals, sums.histograms)
    return sums


def _fitting(found: Totals) -> Frame | None:
    """Units for values whose squares leave the range of float64; `None` where none do."""
    half = 0.5 if found.largest == math.inf else 1.0
    sizes = [max(abs(side.lo), abs(side.hi)) for side in (found.ref, found.other)]
    sizes.append(found.largest)
    units = [1 / _UNIT if x > _BIG else _UNIT if 0 < x < 1 / _BIG else 1.0 for x in sizes]
    if units == [1.0, 1.0, 1.0]:
        return None
    return Frame(units[0], units[1], half, units[2], 0, 0, 0)
