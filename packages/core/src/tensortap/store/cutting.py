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
    valid = {} if padded or placement is None else dict(placement.valid)
    lengths = {axis_of(axis, place.logical): length for axis, length in valid.items()}
    if part is not None:
        axis = axis_of(part.axis, place.logical)
        end = lengths.pop(axis, place.logical[axis])
        tensor = take(tensor, axis, local(_clip(part.segments, end), place.axes[axis]))
    for axis, end in lengths.items():
        tensor = take(tensor, axis, local([(0, end)], place.axes[axis]))
    return tensor


def local(wanted: Sequence[Segment], held: Sequence[Stretch]) -> list[Segment]:
    """Where the wanted stretches of a logical axis are in a piece, in the order wanted."""
    if len(wanted) * len(held) > _MOST_PAIRS:
        raise RunError("the parts and placements are cut too finely to be real")
    found = []
    for start, length in wanted:
        for part in held:
            first = max(start, part.start)
            last = min(start + length, part.start + part.length)
            if first < last:
                found.append((part.local + first - part.start, last - first))
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


def _clip(segments: Sequence[Segment], end: int) -> list[Segment]:
    return [(start, min(length, end - start)) for start, length in segments if start < end]


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
