"""Cutting a tensor into blocks along one axis, and putting it together again."""

from __future__ import annotations

import torch
from torch.nn import functional


def split(x: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Axis `axis` becomes two: blocks, and the elements of one; a short last block gets zeros.

    A view where the length is a multiple of `block`. A scalar becomes a vector first.
    """
    if x.dim() == 0:
        x = x.reshape(1)
    missing = -x.shape[axis] % block
    if missing:
        x = functional.pad(x, [0, 0] * (x.dim() - 1 - axis) + [0, missing])
    shape = (*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
    return x.reshape(shape)


def join(blocks: torch.Tensor, axis: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `split`: contiguous, of the shape the tensor had."""
    whole = blocks.flatten(axis, axis + 1)
    length = shape[axis] if shape else 1
    if whole.shape[axis] != length:
        whole = whole.narrow(axis, 0, length)
    return whole.reshape(shape).contiguous()


def amax(blocks: torch.Tensor, axis: int) -> torch.Tensor:
    """The largest magnitude of each block, its axis kept at length 1; NaN if one is NaN."""
    if blocks.numel() == 0:
        shape = list(blocks.shape)
        shape[axis + 1] = 1
        return blocks.new_zeros(shape)
    return blocks.abs().amax(axis + 1, keepdim=True)
