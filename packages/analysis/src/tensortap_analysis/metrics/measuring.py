"""`measure`: all metrics of a pair of tensors, given as a whole or in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import torch

from tensortap.errors import NotSupported
from tensortap_analysis.metrics.counted import counted, tables_of
from tensortap_analysis.metrics.engines import engine
from tensortap_analysis.metrics.pairs import BlockPair, cut, prepared, value_shape
from tensortap_analysis.metrics.passes import Blocks, Passes
from tensortap_analysis.metrics.report import Given, report
from tensortap_analysis.metrics.result import Metrics
from tensortap_analysis.metrics.scanned import scanned

BLOCK = 1 << 22
"""Values compared at once by `measure_tensors`."""


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


def measure(blocks: Blocks, *, shape: Sequence[int], threads: int | None = None) -> Metrics:
    """All metrics of a pair given as blocks, which follow each other in logical order.

    `blocks()` is called for each pass, usually twice and for a single block once, and must give
    the same values each time; two blocks of a pair hold equally many values, `shape` is that of
    the whole. Blocks may lie on any device; a copy is made of those that are not contiguous.
    Besides one block, the passes take some 40 MiB. `threads` are torch's unless said otherwise.
    Raises `NotSupported` for blocks that do not match each other or `shape`, and `RunError` when
    the values change between passes.
    """
    passes, machine = Passes(blocks), engine(threads)
    pairs = iter(passes)
    first = next(pairs, None)
    values = math.prod(shape) * passes.parts
    tables = None if first is None else tables_of(first)
    whole = pairs if first is None else chain([first], pairs)
    del first  # or it would stay in memory beside the others
    if tables is not None:
        found = counted(whole, tables, machine, values)
    else:
        found = scanned(whole, passes, machine, values)
    given = Given(tuple(shape), passes.parts, passes.one_dtype, passes.floats)
    return report(found, given)


def change(blocks: Iterable[BlockPair]) -> tuple[float, float]:
    """The largest and the summed |other - ref| of a pair given as blocks; NaN once one of them is.

    Raises `NotSupported` for blocks that do not match each other.
    """
    machine, largest, total = engine(), 0.0, 0.0
    for ref, other in blocks:
        size, sizes = machine.change(*prepared(ref, other))
        largest = size if size > largest or math.isnan(size) else largest
        total += sizes
    return largest, total
