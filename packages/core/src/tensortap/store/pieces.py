"""One rank's piece of a logical tensor, and where its placement says that it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tensortap.errors import RunError
from tensortap.records import Placement, Segment


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A payload with what is needed to place it.

    `parallel` is `RunInfo.parallel` of its rank: for a group `g` it holds the group's size as
    `g` and this rank's place in it as `g_rank` (`{"tp": 2, "tp_rank": 0}`).
    """

    rank: int
    tensor: torch.Tensor
    placement: Placement | None
    parallel: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Stretch:
    """`length` positions of a logical axis from `start`, held by a piece from `local`."""

    start: int
    length: int
    local: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """The logical shape, and for each of its axes the stretches a piece holds, in order."""

    logical: tuple[int, ...]
    axes: tuple[tuple[Stretch, ...], ...]


def geometry(piece: Piece) -> Geometry:
    """Where a piece lies; without a placement it is the whole tensor.

    Raises `RunError` when the placement is unknown or does not fit the piece's shape.
    """
    shape = tuple(piece.tensor.shape)
    placement = piece.placement or Placement()
    if placement.unknown:
        raise RunError(
            f"the placement of rank {piece.rank}'s piece is unknown; ask for it with "
            f"rank={piece.rank}"
        )
    # A placement that only speaks of padding, sums or parts leaves the shape to the piece.
    logical = placement.logical_shape or shape
    segments = {axis_of(axis, shape): runs for axis, runs in placement.segments.items()}
    if len(logical) != len(shape):
        raise _misfit(piece, f"logical shape {logical}")
    axes = tuple(
        _stretches(piece, axis, size, segments.get(axis, ((0, size),)))
        for axis, size in enumerate(logical)
    )
    return Geometry(logical, axes)


def axis_of(axis: int, shape: Sequence[int]) -> int:
    """A possibly negative axis as an index into `shape`; raises `RunError`."""
    if not -len(shape) <= axis < len(shape):
        raise RunError(f"the placement speaks of axis {axis} of a tensor of shape {tuple(shape)}")
    return axis % len(shape)


def _stretches(
    piece: Piece, axis: int, size: int, segments: Sequence[Segment]
) -> tuple[Stretch, ...]:
    stretches = []
    local = 0
    for start, length in segments:
        if start + length > size:
            raise _misfit(piece, f"{start}:{start + length} of an axis of {size}")
        stretches.append(Stretch(start, length, local))
        local += length
    if local != piece.tensor.shape[axis]:
        raise _misfit(piece, f"{local} positions on axis {axis}")
    return tuple(stretches)


def _misfit(piece: Piece, claim: str) -> RunError:
    return RunError(
        f"the placement of rank {piece.rank} says {claim}, but its piece has shape "
        f"{tuple(piece.tensor.shape)}; ask for it with rank={piece.rank}"
    )


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as uint8 with a trailing axis of its element's bytes: any dtype, any NaN."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


def from_bytes(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of `raw_bytes`."""
    return raw.contiguous().view(dtype).squeeze(-1)
