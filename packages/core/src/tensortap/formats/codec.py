"""What every number format offers: `Codec`; and what it makes of a tensor: `Quantized`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from tensortap.errors import ConfigError
from tensortap.records import FormatInfo


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor as codes and scales; `Codec.dequantize` needs nothing else.

    `codes` has the shape of the tensor, one code an element: in torch's own dtype where there is
    one (int8, float16, bfloat16, float8_e4m3fn, float8_e5m2), else as uint8 bit patterns.
    `scales` is `None` where a format has none; along the blocked axis it has one entry a block.
    `tensor_scale` is the second, float32 scale of nvfp4.
    """

    format: str
    codes: torch.Tensor
    scales: torch.Tensor | None
    axis: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor_scale: torch.Tensor | None = None


class Codec(Protocol):
    """A number format with its options; immutable, so one may serve many threads."""

    @property
    def name(self) -> str:
        """The name `formats.get` knows it by."""
        ...

    @property
    def block(self) -> int | None:
        """How many elements along the axis share a scale; `None`: the format has no blocks."""
        ...

    @property
    def info(self) -> FormatInfo:
        """What a record says about a tensor whose values lie on this grid."""
        ...

    def quantize(self, x: torch.Tensor, axis: int = -1) -> Quantized:
        """Codes and scales of a floating-point tensor of any shape and layout.

        `axis` is the contraction axis of the product `x` takes part in: blocks lie along it.
        Raises `ConfigError` when `x` is not floating-point or has no such axis.
        """
        ...

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        """The values on the grid, in float32; in float64 if the quantised tensor was float64."""
        ...

    def fake_quantize(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """`dequantize(quantize(x)).to(x.dtype)` at once: new memory, no graph for autograd.

        On the CPU float32 and bfloat16 go through a compiled kernel, in one pass. The memory
        layout is that of `x` or contiguous.
        """
        ...


def working(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision formats compute in: float64 stays, all else is exact in float32."""
    _check_floating(x)
    return x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()


def compact(x: torch.Tensor) -> torch.Tensor:
    """`x` as the compiled kernel takes it: bfloat16 stays too, it is widened on the way."""
    return x.detach() if x.dtype is torch.bfloat16 else working(x)


def in_float32(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, for the rules that are defined from there; float64 is rounded."""
    _check_floating(x)
    return x.detach().float()


def resolve_axis(x: torch.Tensor, axis: int) -> int:
    """`axis` counted from the front; a scalar counts as a vector of one element."""
    axes = max(x.dim(), 1)
    if not -axes <= axis < axes:
        shape = tuple(x.shape)
        raise ConfigError(f"axis={axis} is not one of the {axes} axes of a tensor of {shape}.")
    return axis % axes


def check_format(quantized: Quantized, name: str) -> None:
    """Codes of one format mean nothing in another: raises `ConfigError`."""
    if quantized.format != name:
        raise ConfigError(
            f"these are codes of {quantized.format}, not of {name}; "
            f"use formats.get({quantized.format!r})."
        )


def _check_floating(x: torch.Tensor) -> None:
    if not x.dtype.is_floating_point:
        dtype = str(x.dtype).removeprefix("torch.")
        raise ConfigError(f"a {dtype} tensor cannot be quantised; convert it to floating-point.")
