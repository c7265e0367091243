"""Examining one match: values where both runs have them, else a sample, else statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from tensortap import stats
from tensortap.errors import NotSupported, RunError
from tensortap.records import Statistics, TensorRecord
from tensortap.store.dtypes import dtype_name
from tensortap.store.logical import LogicalTensor
from tensortap_analysis.captured.moments import Catalogue, Moment
from tensortap_analysis.measuring.bounds import bounds_of, said
from tensortap_analysis.measuring.boxes import boxes
from tensortap_analysis.measuring.merging import Merged, merged, together
from tensortap_analysis.measuring.sampling import sampled
from tensortap_analysis.metrics import Metrics, measure
from tensortap_analysis.pairs.alignment import Alignment, align
from tensortap_analysis.pairs.pair import Half, Pair
from tensortap_analysis.pairs.pairing import Match
from tensortap_analysis.pairs.reasons import NotComparable, kind_of

BLOCK = 1 << 22
"""Elements of each side that are in memory at once."""
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)


def examine(
    match: Match,
    ref: Catalogue,
    other: Catalogue,
    *,
    block: int = BLOCK,
    threads: int | None = None,
) -> Pair:
    """How the two tensors of a match differ; raises `NotComparable`. On torch's threads or fewer.

    Both with all values: all metrics, read block by block. A sample against the same sample or
    against all values: all metrics of the sample. Else statistics against statistics.
    """
    order = ref.moments[match.ref].order
    kinds = {ref.moments[match.ref].values, other.moments[match.other].values}
    try:
        if kinds == {"full"}:
            return _values(match, order, ref, other, block, threads)
        found = _sample(match, order, ref, other) if "stats" not in kinds else None
        return found or _statistics(match, order, ref, other, block)
    except (RunError, NotSupported) as failure:
        raise NotComparable(str(failure).rstrip("."), kind_of(failure)) from failure


def _values(
    match: Match, order: int, ref: Catalogue, other: Catalogue, block: int, threads: int | None
) -> Pair:
    one, two, aligned = _aligned(match, ref, other)
    metrics = difference(one, two, aligned, block, threads)
    if aligned.moves and metrics.max_abs_at is not None:
        metrics = replace(metrics, max_abs_at=aligned.ref.place(metrics.max_abs_at))
    return Pair(match.at, order, "values", _half(one), _half(two), metrics, note=aligned.note)


def _aligned(
    match: Match, ref: Catalogue, other: Catalogue
) -> tuple[LogicalTensor, LogicalTensor, Alignment]:
    """Both tensors without padding, also where only one side knows what padding is."""
    one, two = ref.tensor(match.ref, match.name), other.tensor(match.other, match.name)
    found = align(one.shape, one.dims, two.shape, two.dims)
    if not isinstance(found, str):
        return one, two, found
    valid = one.shape, two.shape
    one = ref.tensor(match.ref, match.name, padded=True)
    two = other.tensor(match.other, match.name, padded=True)
    padded = align(one.shape, one.dims, two.shape, two.dims)
    if isinstance(padded, str) or (one.shape, two.shape) == valid:
        raise NotComparable(found, "shape")
    return one, two, padded.cut(*valid)


def difference(
    one: LogicalTensor,
    two: LogicalTensor,
    aligned: Alignment,
    block: int = BLOCK,
    threads: int | None = None,
) -> Metrics:
    """All metrics of two logical tensors, of which one block each is in memory at a time."""
    shape = aligned.shape
    if _PACKED is not None and one.dtype == two.dtype == _PACKED and shape:
        if aligned.moves:
            raise NotComparable("the axes of packed 4-bit values cannot be moved")
        shape = (*shape[:-1], 2 * shape[-1])
    return measure(lambda: blocks(one, two, aligned, block), shape=shape, threads=threads)


def blocks(
    one: LogicalTensor, two: LogicalTensor, aligned: Alignment, elements: int = BLOCK
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both tensors in boxes of at most so many elements, in the order of the common axes."""
    for box in aligned.boxes(elements):
        yield aligned.ref.read(one.read, box), aligned.other.read(two.read, box)


def _half(tensor: LogicalTensor) -> Half:
    return _alike(tensor.shape, dtype_name(tensor.dtype), tensor.dims)


def _sample(match: Match, order: int, ref: Catalogue, other: Catalogue) -> Pair | None:
    """The sampled elements of both; `None` where they were not taken at the same places."""
    if match.is_part:
        return None
    one, two = ref.moments[match.ref], other.moments[match.other]
    found = sampled(one, two)
    if found is None:
        return None
    metrics, note = found
    return Pair(
        match.at, order, "sample", _half_of(one.first()), _half_of(two.first()), metrics, note=note
    )


def _statistics(match: Match, order: int, ref: Catalogue, other: Catalogue, block: int) -> Pair:
    if match.is_part:
        raise NotComparable("statistics of a fused tensor do not tell its parts")
    (one, mine), (two, theirs) = (
        _described(side, moment, block) for side, moment in ((ref, match.ref), (other, match.other))
    )
    if mine.held != theirs.held:
        raise NotComparable("statistics of pieces that hold other elements do not compare")
    if mine.statistics.count != theirs.statistics.count:
        raise NotComparable(
            f"statistics of {mine.statistics.count:,} and {theirs.statistics.count:,} values do "
            "not compare"
        )
    elementwise = (one.shape, one.dims) == (two.shape, two.dims)
    bounds = bounds_of(mine.statistics, theirs.statistics, elementwise=elementwise)
    metrics = said(mine.statistics, theirs.statistics)
    note = "statistics only, of one piece" if mine.held else "statistics only"
    return Pair(match.at, order, "statistics", one, two, metrics, bounds, note)


def _described(side: Catalogue, moment: Moment, block: int) -> tuple[Half, Merged]:
    """The statistics of the logical tensor, merged from its pieces or computed from its values."""
    captured = side.moments[moment]
    records = captured.records()
    try:
        return _half_of(records[0]), merged(captured, records)
    except NotComparable:
        if captured.values != "full":
            raise
    tensor = side.tensor(moment, moment.name)
    return _half(tensor), Merged(_statistics_of(tensor, block))


def _statistics_of(tensor: LogicalTensor, block: int) -> Statistics:
    """Of all values, block by block."""
    parts = [stats.statistics(tensor.read(box)) for box in boxes(tensor.shape, block)]
    return replace(together(parts), first=parts[0].first)


def _half_of(record: TensorRecord) -> Half:
    shape = record.placement.logical_shape if record.placement is not None else ()
    if math.prod(shape) < math.prod(record.shape):
        shape = record.shape
    return _alike(tuple(shape), record.dtype, record.dims)


@lru_cache(maxsize=4096)
def _alike(shape: tuple[int, ...], dtype: str, dims: str | None) -> Half:
    """One for all tensors that look alike: a run may have a hundred thousand."""
    return Half(shape, dtype, dims)
