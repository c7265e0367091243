"""`measure`: the passes over pairs of blocks, from sums to exact percentiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from tensortap.errors import NotSupported
from tensortap.native.comparing import Frame, Histograms, Quest, Totals
from tensortap_analysis.metrics.engines import Engine, engine
from tensortap_analysis.metrics.pairs import Pair, cut, prepared, value_shape
from tensortap_analysis.metrics.report import PERCENTS, Findings, report
from tensortap_analysis.metrics.result import Metrics
from tensortap_analysis.metrics.selection import Search, percentile_ranks, search

Blocks = Callable[[], Iterable[Pair]]

BLOCK = 1 << 22
"""Values compared at once by `measure_tensors`."""
_BIG, _UNIT = 2.0**480, 2.0**600


def measure_tensors(ref: torch.Tensor, other: torch.Tensor, *, block: int = BLOCK) -> Metrics:
    """All metrics of two tensors of equal shape and any dtypes; they may be memory-mapped.

    `block` values are looked at together: a tensor that is not contiguous, or on a device, is
    copied by that many. Raises `NotSupported` for different shapes and for what holds no values.
    """
    shape = value_shape(ref)
    if shape != value_shape(other):
        shapes = f"{list(shape)} and {list(value_shape(other))}"
        raise NotSupported(f"Tensors of shapes {shapes} cannot be compared value by value.")
    limit = max(2, block // 2 * 2)
    return measure(lambda: cut(ref, other, limit), shape=shape)


def measure(blocks: Blocks, *, shape: Sequence[int]) -> Metrics:
    """All metrics of a pair given as blocks, which follow each other in logical order.

    `blocks()` is called for each pass, usually twice, and must give the same values each time;
    two blocks of a pair hold equally many values, `shape` is that of the whole. Blocks may lie on
    any device; a copy is made of those that are not contiguous. Besides one block, the passes
    take some 40 MiB. Raises `NotSupported` for blocks that do not match each other or `shape`,
    and `RunError` when the values change between passes.
    """
    scan = _Scan(engine(), blocks)
    totals = scan.totals(math.prod(shape))
    searches = scan.order_statistics() if totals.compared else None
    findings = Findings(
        totals, scan.frame, scan.histograms, one_dtype=scan.one_dtype, floats=scan.floats,
        shape=tuple(shape), parts=2 if scan.is_complex else 1,
        absolute=searches[0].found if searches else {},
        relative=searches[1].found if searches else {},
    )  # fmt: skip
    return report(findings)


@dataclass(slots=True)
class _Scan:
    """The passes over one pair of tensors, and what they have found."""

    engine: Engine
    blocks: Blocks
    frame: Frame = field(default_factory=lambda: Frame(1, 1, 1, 1, 0, 0, 0))
    all: Totals = field(default_factory=Totals.none)
    histograms: Histograms = field(default_factory=Histograms)
    one_dtype: bool = True
    floats: bool = True
    is_complex: bool = False

    def totals(self, values: int) -> Totals:
        """Sums in units that keep their squares in range, which may take a second pass."""
        self._add_up()
        expected = values * (2 if self.is_complex else 1)
        if self.all.count != expected:
            raise NotSupported(f"The blocks hold {self.all.count} values, the shape {expected}.")
        frame = _fitting(self.all) if self.all.compared else None
        if frame is not None:
            self.frame, self.all, self.histograms = frame, Totals.none(), Histograms()
            self._add_up()
        return self.all

    def order_statistics(self) -> tuple[Search, Search]:
        """The ranks percentiles and median need, of differences and of relative ones."""
        count, zero = self.all.compared, self.all.zero
        absolute = Search.begun(self.histograms.absolute, zero, percentile_ranks(count, PERCENTS))
        relative = Search.begun(self.histograms.relative, zero, percentile_ranks(count, [50]))
        search(self._look, absolute, relative, threads=self.engine.threads)
        return absolute, relative

    def _add_up(self) -> None:
        for ref, other in self.blocks():
            self.one_dtype &= ref.dtype == other.dtype
            self.floats &= ref.is_floating_point() or ref.is_complex()
            self.is_complex |= ref.is_complex() or other.is_complex()
            one, two = prepared(ref, other)
            if not self.all.compared:
                self._set_origins(one, two)
            self.engine.add(one, two, self.frame, self.all, self.histograms)

    def _set_origins(self, ref: torch.Tensor, other: torch.Tensor) -> None:
        """From a value of the tensors: never farther from the mean than the farthest of them."""
        pair = self.engine.first(ref, other)
        if pair is None:
            return
        r, o = pair
        frame = self.frame
        frame.ref_origin, frame.other_origin = r * frame.ref, o * frame.other
        frame.difference_origin = (o * frame.half - r * frame.half) * frame.difference

    def _look(self, absolute: Quest | None, relative: Quest | None) -> None:
        for ref, other in self.blocks():
            self.engine.select(*prepared(ref, other), self.frame, absolute, relative)


def _fitting(found: Totals) -> Frame | None:
    """Units for values whose squares leave the range of float64; `None` where none do."""
    half = 0.5 if found.largest == math.inf else 1.0
    sizes = [max(abs(side.lo), abs(side.hi)) for side in (found.ref, found.other)]
    sizes.append(found.largest)
    units = [1 / _UNIT if x > _BIG else _UNIT if 0 < x < 1 / _BIG else 1.0 for x in sizes]
    if units == [1.0, 1.0, 1.0]:
        return None
    return Frame(units[0], units[1], half, units[2], 0, 0, 0)
