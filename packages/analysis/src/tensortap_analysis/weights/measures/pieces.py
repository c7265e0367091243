"""A matrix in pieces of whole rows, small enough for a core's cache, as float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_VALUES = 1 << 16
_AS_STORED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)


def cut(matrix: torch.Tensor, times: int = 1) -> tuple[torch.Tensor, ...]:
    """Views of some rows each, at least one; `times` as many where less is made of them."""
    height, width = matrix.shape
    return torch.split(matrix, max(1, times * _VALUES // max(width, 1))) if height else ()


def floats(piece: torch.Tensor) -> torch.Tensor:
    """As it is where it is a float of 16 bits or more; other dtypes in one that holds them."""
    if piece.dtype in _AS_STORED:
        return piece
    return piece.to(torch.float64 if piece.dtype in _WIDE else torch.float32)


def working(matrix: torch.Tensor) -> torch.dtype:
    """What number formats are computed in: float64 where float32 would round the values."""
    return torch.float64 if matrix.dtype in _WIDE else torch.float32


def witnessed(matrix: torch.Tensor, largest: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pieces in working precision, and each with one more row that holds the largest value.

    A format with a scale for the whole tensor finds its scale in the second. Both are views of
    one buffer, which the next piece overwrites.
    """
    pieces = cut(matrix)
    if not pieces:
        return
    height = len(pieces[0])
    buffer = torch.zeros(height + 1, matrix.shape[1], dtype=working(matrix))
    for piece in pieces:
        count = len(piece)
        buffer[:count] = piece
        buffer[count] = 0
        buffer[count, 0] = largest
        yield buffer[:count], buffer[: count + 1]
