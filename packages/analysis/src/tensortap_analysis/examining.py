"""Examining one match: values where both runs have them, else a sample, else statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tensortap import stats
from tensortap.errors import NotSupported, RunError
from tensortap.records import Statistics, TensorRecord
from tensortap.store.logical import LogicalTensor
from tensortap_analysis.alignment import Alignment, align
from tensortap_analysis.bounds import bounds_of, merged, said
from tensortap_analysis.metrics import Metrics, measure, measure_tensors
from tensortap_analysis.moments import Catalogue, Moment
from tensortap_analysis.pairing import Match
from tensortap_analysis.pairs import Half, Pair

BLOCK = 1 << 22
"""Elements of each side that are in memory at once."""
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)


class NotComparable(Exception):
    """These two tensors cannot be compared; the message is the reason, as half a sentence."""


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
        return found or _statistics(match, order, ref, other)
    except (RunError, NotSupported) as failure:
        raise NotComparable(str(failure).rstrip(".")) from failure


def _values(
    match: Match, order: int, ref: Catalogue, other: Catalogue, block: int, threads: int | None
) -> Pair:
    one, two, aligned = _aligned(match, ref, other)
    metrics = difference(one, two, aligned, block, threads)
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
        raise NotComparable(found)
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
    return Half(tensor.shape, str(tensor.dtype).removeprefix("torch."), tensor.dims)


def _sample(match: Match, order: int, ref: Catalogue, other: Catalogue) -> Pair | None:
    """The sampled elements of both; `None` where they were not taken at the same places."""
    ones, twos = ref.records(match.ref), other.records(match.other)
    if match.is_part or len(ones) != 1 or len(twos) != 1:
        return None
    (one,), (two,) = ones, twos
    strides = {record.stride for record in (one, two) if record.values == "sample"}
    if len(strides) > 1 or one.shape != two.shape or one.dims != two.dims:
        return None
    (stride,) = strides
    tensors = _elements(one, ref, stride), _elements(two, other, stride)
    note = f"every {stride}th element" if stride != 1 else None
    halves = _half_of(one), _half_of(two)
    return Pair(match.at, order, "sample", *halves, measure_tensors(*tensors), note=note)


def _elements(record: TensorRecord, side: Catalogue, stride: int) -> torch.Tensor:
    if record.values == "sample":
        return side.run.sample(record)
    return side.run.piece(record).reshape(-1)[::stride]


def _statistics(match: Match, order: int, ref: Catalogue, other: Catalogue) -> Pair:
    if match.is_part:
        raise NotComparable("statistics of a fused tensor do not tell its parts")
    (one, mine), (two, theirs) = (
        _described(side, moment) for side, moment in ((ref, match.ref), (other, match.other))
    )
    if mine.count != theirs.count:
        raise NotComparable(
            f"statistics of {mine.count:,} and {theirs.count:,} values do not compare"
        )
    elementwise = (one.shape, one.dims) == (two.shape, two.dims)
    bounds = bounds_of(mine, theirs, elementwise=elementwise)
    metrics = said(mine, theirs)
    return Pair(match.at, order, "statistics", one, two, metrics, bounds, "statistics only")


def _described(side: Catalogue, moment: Moment) -> tuple[Half, Statistics]:
    """The statistics of the logical tensor, merged from its pieces or computed from its values."""
    records = side.records(moment)
    if side.moments[moment].values == "full":
        tensor = side.tensor(moment, moment.name)
        known = records[0].stats if len(records) == 1 and not _padded(records[0]) else None
        return _half(tensor), known or stats.statistics(tensor.tensor())
    found = merged(records)
    if isinstance(found, str):
        raise NotComparable(found)
    return _half_of(records[0]), found


def _padded(record: TensorRecord) -> bool:
    return record.placement is not None and bool(record.placement.valid)


def _half_of(record: TensorRecord) -> Half:
    shape = record.placement.logical_shape if record.placement is not None else ()
    if math.prod(shape) < math.prod(record.shape):
        shape = record.shape
    return Half(tuple(shape), record.dtype, record.dims)
