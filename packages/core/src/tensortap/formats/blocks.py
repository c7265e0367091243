"""Cutting a tensor into blocks along one axis, and putting it together again."""

from __future__ import annotations

import torch
from torch.nn import functional

from tensortap.errors import ConfigError
from tensortap.formats.codec import Quantized


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


def placed_scales(quantized: Quantized, block: int) -> tuple[torch.Tensor, int]:
    """The scales and the axis they lie along; raises `ConfigError` if they are not the codes'.

    Codes and scales may have been loaded, moved or cut by hand.
    """
    codes, scales, axis = quantized.codes, quantized.scales, quantized.axis
    if scales is None or axis is None:
        raise ConfigError(f"codes of {quantized.format} without scales have no values.")
    wanted = list(codes.shape) or [1]
    wanted[axis] = -(-wanted[axis] // block)
    if list(scales.shape) != wanted or tuple(codes.shape) != quantized.shape:
        raise ConfigError(
            f"codes of {tuple(codes.shape)} for a tensor of {quantized.shape} need scales of "
            f"{tuple(wanted)}, not {tuple(scales.shape)}."
        )
    if scales.device != codes.device:
        raise ConfigError(f"codes are on {codes.device}, their scales on {scales.device}.")
    return scales, axis


def amax(blocks: torch.Tensor, axis: int) -> torch.Tensor:
    """The largest magnitude of each block, its axis kept at length 1; NaN if one is NaN."""
    if blocks.numel() == 0:
        shape = list(blocks.shape)
        shape[axis + 1] = 1
        return blocks.new_zeros(shape)
    return blocks.abs().amax(axis + 1, keepdim=True)
