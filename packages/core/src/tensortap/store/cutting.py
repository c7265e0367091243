"""Cutting the wanted positions out of a tensor: parts of a fused one, and padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tensortap.errors import RunError
from tensortap.records import Part, Placement, Segment
from tensortap.store.pieces import Geometry, Stretch, axis_of, from_bytes, raw_bytes

_MOST_PAIRS = 1 << 22


def cut(
    tensor: torch.Tensor,
    place: Geometry,
    placement: Placement | None,
    part: Part | None,
    *,
    padded: bool,
) -> torch.Tensor:
    """`tensor`, which lies at `place`, reduced to one part of it and to its valid lengths."""
    wanted = wanted_segments(place.logical, placement, part, padded=padded)
    for axis, (runs, held) in enumerate(zip(wanted, place.axes, strict=True)):
        if runs != [(0, place.logical[axis])]:
            tensor = take(tensor, axis, [local for _, local in overlaps(runs, held)])
    return tensor


def wanted_segments(
    logical: Sequence[int], placement: Placement | None, part: Part | None, *, padded: bool
) -> list[list[Segment]]:
    """The stretches of every logical axis that are left of it, in order."""
    runs: list[list[Segment]] = [[(0, size)] for size in logical]
    if part is not None:
        runs[axis_of(part.axis, logical)] = list(part.segments)
    valid = {} if padded or placement is None else placement.valid
    for axis, end in valid.items():
        at = axis_of(axis, logical)
        runs[at] = [(start, min(length, end - start)) for start, length in runs[at] if start < end]
    return runs


def overlaps(wanted: Sequence[Segment], held: Sequence[Stretch]) -> list[tuple[Segment, Segment]]:
    """(where among the wanted, where in the piece) of each stretch that is wanted and held.

    Positions among the wanted are those of the stretches laid end to end, in the order wanted.
    """
    if len(wanted) * len(held) > _MOST_PAIRS:
        raise RunError("the parts and placements are cut too finely to be real")
    found, at = [], 0
    for start, length in wanted:
        for part in held:
            first, last = max(start, part.start), min(start + length, part.start + part.length)
            if first < last:
                here = (at + first - start, last - first)
                found.append((here, (part.local + first - part.start, last - first)))
        at += length
    return found


def take(tensor: torch.Tensor, axis: int, segments: Sequence[Segment]) -> torch.Tensor:
    """These stretches of an axis, one after another; a single one is a view."""
    if len(segments) == 1:
        [(start, length)] = segments
        return tensor.narrow(axis, start, length)
    if not segments:
        return tensor.narrow(axis, 0, 0)
    raw = raw_bytes(tensor)
    return from_bytes(
        torch.cat([raw.narrow(axis, start, length) for start, length in segments], dim=axis),
        tensor.dtype,
    )


def require_one(placements: Sequence[Placement | None]) -> Placement | None:
    """The valid lengths and parts all pieces agree on; raises `RunError` when they do not."""
    first = placements[0]
    for other in placements[1:]:
        if _shared(first) != _shared(other):
            raise RunError("pieces differ in their valid lengths or parts; ask with rank=")
    return first


def _shared(placement: Placement | None) -> tuple[object, object]:
    found = placement or Placement()
    return dict(found.valid), found.parts
