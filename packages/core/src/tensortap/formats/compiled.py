"""Rounding and decoding CPU tensors by the compiled kernel, where it is there and can serve.

It gives what the torch operations of the codecs give, bit for bit, in one pass; every function
returns `None` where it cannot.
"""

from __future__ import annotations

import torch

from tensortap import native
from tensortap.formats.minifloat import Element
from tensortap.native.rounding import Grid

_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def round_blocks(
    x: torch.Tensor,
    axis: int,
    element: Element,
    block: int,
    tensor_scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`x` on the grid, in blocks along `axis`.

    The scales are powers of two (MX), or with a `tensor_scale` E4M3 beside it (NVFP4).
    """
    kernel = _kernel(x)
    if kernel is None:
        return None
    dense, order = _dense(x)
    to, grid = torch.empty_like(dense), _grid(element, block, tensor_scale)
    kernel.rounding.blocks(dense, to, order.index(axis), grid, threads=_threads(kernel))
    return _restored(to, order).reshape(x.shape)


def encode_blocks(
    x: torch.Tensor,
    axis: int,
    element: Element,
    block: int,
    tensor_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The codes of `x` and of its scales, both uint8; otherwise as `round_blocks`."""
    kernel = _kernel(x)
    if kernel is None:
        return None
    dense, order = _dense(x)
    place, shape = order.index(axis), list(dense.shape)
    shape[place] = -(-shape[place] // block)
    codes = torch.empty_like(dense, dtype=torch.uint8)
    scales = torch.empty(shape, dtype=torch.uint8, device="cpu")
    grid = _grid(element, block, tensor_scale)
    kernel.rounding.block_codes(dense, codes, scales, place, grid, threads=_threads(kernel))
    return _restored(codes, order).reshape(x.shape), _restored(scales, order)


def hifloat8(x: torch.Tensor, *, saturate: bool, codes: bool = False) -> torch.Tensor | None:
    """`x` in HiFloat8 with ties away from zero: values, or codes (uint8)."""
    kernel = _kernel(x)
    if kernel is None:
        return None
    dense, order = _dense(x)
    to = torch.empty_like(dense, dtype=torch.uint8 if codes else x.dtype)
    kernel.rounding.hifloat8(dense, to, saturate=saturate, threads=_threads(kernel))
    return _restored(to, order).reshape(x.shape)


def decode(
    codes: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor | None = None,
    axis: int = 0,
    block: int = 1 << 14,
) -> torch.Tensor | None:
    """Values of uint8 codes: `table[code]`, times the float32 scale of the block, if any."""
    kernel = _kernel(codes)
    if kernel is None:
        return None
    dense, order = _dense(codes)
    to = torch.empty_like(dense, dtype=torch.float32)
    if scales is None:
        dense, place = dense.reshape(-1), 0
    else:
        place = order.index(axis)
        scales = scales.reshape([-1] if codes.dim() == 0 else scales.shape)
        scales = scales.permute(order).contiguous()
    kernel.rounding.decode(dense, table, scales, to, place, block, threads=_threads(kernel))
    return _restored(to, order).reshape(codes.shape)


def serves(x: torch.Tensor) -> bool:
    """Whether the kernel can be given these values or codes; decided without reading them."""
    return _kernel(x) is not None


def _grid(element: Element, block: int, tensor_scale: torch.Tensor | None) -> Grid:
    grid = Grid(
        block=block, power_of_two=tensor_scale is None, emin=element.emin,
        mantissa=element.mantissa_bits, emax=element.emax, sign=element.bits - 1, max=element.max,
    )  # fmt: skip
    if tensor_scale is not None:
        grid.tensor_scale = float(tensor_scale)
        grid.tensor_inverse = float(tensor_scale.reciprocal())
    return grid


def _kernel(x: torch.Tensor) -> native.Library | None:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in _DTYPES:
        return None
    # Only a tensor with memory of its own: no subclass, no function transform, no trace, no fake.
    if type(x) not in _PLAIN or x.layout is not torch.strided or x.is_neg():
        return None
    functional = torch._C._functorch.is_functorch_wrapped_tensor(x)
    if functional or torch._C._get_tracing_state() or torch._C._len_torch_dispatch_stack():
        return None
    return native.library()


def _threads(kernel: native.Library) -> int:
    return torch.get_num_threads() if kernel.threaded else 1


def _dense(x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """A contiguous tensor and the order its axes have in `x`; a copy only where `x` has gaps.

    A transposed tensor is taken as it lies, along the axis that takes the axis' place. A scalar
    becomes a vector.
    """
    x = x.detach() if x.dim() else x.detach().reshape(1)
    axes = list(range(x.dim()))
    if x.is_contiguous():
        return x, axes
    order = sorted(axes, key=lambda axis: x.stride(axis), reverse=True)
    turned = x.permute(order)
    return (turned, order) if turned.is_contiguous() else (x.contiguous(), axes)


def _restored(to: torch.Tensor, order: list[int]) -> torch.Tensor:
    if order == sorted(order):
        return to
    return to.permute([order.index(axis) for axis in range(len(order))])
