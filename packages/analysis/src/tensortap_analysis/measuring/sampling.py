"""Comparing the sampled elements of two tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from tensortap.records import Placement, TensorRecord
from tensortap_analysis.captured.moments import Captured
from tensortap_analysis.measuring.merging import groups_to_sum, held
from tensortap_analysis.metrics import Metrics, measure_tensors

_PACKED = "float4_e2m1fn_x2"


def sampled(one: Captured, two: Captured) -> tuple[Metrics, str | None] | None:
    """All metrics of the elements that both have, and a note; `None` where there are none.

    They are the same elements where both took every n-th of one whole tensor, or of the same
    piece of it, in one order of axes. Padding is left out.
    """
    ones, twos = one.records(), two.records()
    if len(ones) != 1 or len(twos) != 1 or not _same_elements(ones[0], twos[0]):
        return None
    if not all(_is_whole(record, found) for record, found in ((ones[0], one), (twos[0], two))):
        return None
    (stride,) = {record.stride for record in (ones[0], twos[0]) if record.values == "sample"}
    shape = ones[0].shape
    values = [_elements(*side, stride) for side in ((ones[0], one), (twos[0], two))]
    places = torch.arange(0, math.prod(shape), stride)
    kept = _valid(places, shape, [record.placement for record in (ones[0], twos[0])])
    # Not every dtype can be indexed by a mask.
    metrics = measure_tensors(*(side if kept.all() else side[kept] for side in values))
    note = f"1 in {stride} elements" if stride != 1 else None
    packed = 2 if ones[0].dtype == twos[0].dtype == _PACKED else 1
    return _placed(metrics, places[kept], shape, packed), note


def _same_elements(one: TensorRecord, two: TensorRecord) -> bool:
    strides = {record.stride for record in (one, two) if record.values == "sample"}
    alike = (one.shape, one.dims, held(one)) == (two.shape, two.dims, held(two))
    return alike and len(strides) == 1


def _is_whole(record: TensorRecord, found: Captured) -> bool:
    """Is it a tensor, or a piece of one, and no summand?"""
    place = record.placement
    if place is None:
        return True
    parallel = found.run.info_of(record.at.rank).parallel
    summed = any(parallel.get(group) != 1 for group in groups_to_sum(place, found))
    return not (summed or place.unknown or (place.valid and held(record)))


def _elements(record: TensorRecord, found: Captured, stride: int) -> torch.Tensor:
    if record.values == "sample":
        return found.run.sample(record)
    return found.run.piece(record).reshape(-1)[::stride]


def _valid(
    places: torch.Tensor, shape: Sequence[int], sides: Sequence[Placement | None]
) -> torch.Tensor:
    """Which of these places are padding on neither side."""
    kept = torch.ones(len(places), dtype=torch.bool)
    for side in sides:
        for axis, length in ({} if side is None else side.valid).items():
            inner = math.prod(shape[axis % len(shape) + 1 :])
            kept &= places // max(inner, 1) % shape[axis] < length
    return kept


def _placed(metrics: Metrics, places: torch.Tensor, shape: Sequence[int], packed: int) -> Metrics:
    """The largest difference by its place in the tensor, not in the sample.

    `packed` is how many values an element holds that are counted one by one.
    """
    if metrics.max_abs_at is None or not shape:
        return metrics
    flat = places[metrics.max_abs_at[0] // packed]
    at = torch.unravel_index(flat, tuple(shape))
    return replace(metrics, max_abs_at=tuple(int(index) for index in at))
