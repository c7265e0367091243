"""Pairs of blocks: cut from two tensors in logical order, and as they are computed with."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from tensortap import stats
from tensortap.errors import NotSupported
from tensortap.native.codes import code_table

BlockPair = tuple[torch.Tensor, torch.Tensor]

_FP4 = getattr(torch, "float4_e2m1fn_x2", None)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def value_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of its values: two for each element of packed 4-bit floats, in the last axis."""
    shape = tuple(tensor.shape)
    if tensor.dtype is not _FP4:
        return shape
    return (*shape[:-1], 2 * shape[-1]) if shape else (2,)


def value_count(tensor: torch.Tensor) -> int:
    """How many values a block holds; a complex element counts once."""
    return math.prod(value_shape(tensor))


def cut(ref: torch.Tensor, other: torch.Tensor, limit: int) -> Iterator[BlockPair]:
    """Blocks of at most `limit` values that follow each other in logical order; views."""
    if ref.is_contiguous() and other.is_contiguous():
        ref, other = ref.view(-1), other.view(-1)
    count = value_count(ref)
    if count <= limit:
        yield ref, other
    elif ref.ndim == 1:
        yield from zip(*(torch.split(x, _elements(x, limit)) for x in (ref, other)), strict=True)
    elif rows := limit * ref.shape[0] // count:
        yield from zip(torch.split(ref, rows), torch.split(other, rows), strict=True)
    else:
        for row in range(ref.shape[0]):
            yield from cut(ref[row], other[row], limit)


def prepared(ref: torch.Tensor, other: torch.Tensor) -> BlockPair:
    """The block on the CPU in one dense row; complex elements are real and imaginary parts.

    A copy only where it has to be. Raises `NotSupported` for blocks that do not match.
    """
    for tensor in (ref, other):
        stats.check(tensor)
    if value_count(ref) != value_count(other):
        shapes = f"{list(value_shape(ref))} and {list(value_shape(other))}"
        raise NotSupported(f"Blocks of {shapes} values cannot be compared; cut them alike.")
    if ref.is_complex() != other.is_complex():
        ref, other = (x if x.is_complex() else _with_imaginary_zeros(x) for x in (ref, other))
    return _dense(ref), _dense(other)


def _elements(tensor: torch.Tensor, values: int) -> int:
    return values // 2 if tensor.dtype is _FP4 else values


def _with_imaginary_zeros(tensor: torch.Tensor) -> torch.Tensor:
    real = _values(tensor)
    return torch.complex(real, torch.zeros_like(real))


def _values(tensor: torch.Tensor) -> torch.Tensor:
    table = code_table(tensor.dtype)
    if table is None:
        return tensor.to(torch.float64)
    return torch.from_numpy(values_of(_dense(tensor))).view(value_shape(tensor))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_contiguous():
        # Not every dtype can be copied in every version of torch; its bits can.
        tensor = tensor.view(_BITS[tensor.element_size()]).contiguous().view(tensor.dtype)
    # An axis of length 1 may have any stride, with which bits cannot be viewed.
    return tensor.as_strided((tensor.numel(),), (1,))


def values_of(block: torch.Tensor) -> npt.NDArray[np.float64]:
    """The values of a prepared block as float64, in one row."""
    table = code_table(block.dtype)
    if table is not None:
        return table.values[codes_of(block)]
    if block.dtype is not torch.bfloat16:
        return block.numpy().astype(np.float64)
    # numpy has no bfloat16: they are the leading halves of float32.
    words = block.view(torch.int16).numpy().astype(np.int32) << 16
    return words.view(np.float32).astype(np.float64)


def codes_of(block: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The codes of a block of a dtype that has a table; packed ones apart."""
    codes: npt.NDArray[np.uint8] = block.view(torch.uint8).numpy()
    if block.dtype is not _FP4:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
