"""Symmetric integers with a float scale: int8 per tensor or channel, int4 in groups.

The scale is amax / 127 (amax / 7), the code round-half-even(x / scale): the restricted range of
-127 .. 127 (-7 .. 7), so that negating a tensor negates its codes. Source: Wu et al., Integer
Quantization for Deep Learning Inference, arXiv 2004.09602, sections 3.1 and 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tensortap.errors import ConfigError
from tensortap.formats import blocks
from tensortap.formats.codec import Quantized, check_format, resolve_axis, working
from tensortap.records import FormatInfo

Scale = Literal["tensor", "channel"]


@dataclass(frozen=True, slots=True)
class Int8:
    """The `int8` format. Codes: int8; scales: float32 (float64 for a float64 tensor).

    `scale="tensor"`: one scale. `"channel"`: one for each index of the axes other than the
    contraction axis: per output channel for a weight, per token for an activation. Where a scale
    covers a NaN or an infinity it is NaN, and so are its values.
    """

    scale: Scale = "tensor"
    name: str = "int8"
    block: int | None = None

    @property
    def info(self) -> FormatInfo:
        return FormatInfo(self.name, None, "nearest-even")

    @torch.no_grad()
    def quantize(self, x: torch.Tensor, axis: int = -1) -> Quantized:
        axis, values = resolve_axis(x, axis), working(x)
        scales = self._scales(values, axis)
        codes = _rounded(values, scales, 127).nan_to_num(0.0).to(torch.int8)
        used = axis if self.scale == "channel" else None
        return Quantized(self.name, codes, scales, used, tuple(x.shape), x.dtype)

    @torch.no_grad()
    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        check_format(quantized, self.name)
        if quantized.scales is None:
            raise ConfigError("codes of int8 have no values without their scales.")
        return quantized.codes.to(quantized.scales.dtype) * quantized.scales

    @torch.no_grad()
    def fake_quantize(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        axis, values = resolve_axis(x, axis), working(x)
        scales = self._scales(values, axis)
        return _rounded(values, scales, 127).mul_(scales).to(x.dtype)

    def _scales(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """0-d for the tensor, else with the contraction axis kept at length 1."""
        if self.scale == "tensor" or values.dim() == 0:
            largest = values.abs().amax() if values.numel() else values.new_zeros(())
            return _scale(largest, 127)
        shape = [1 if at == axis else size for at, size in enumerate(values.shape)]
        empty = values.numel() == 0
        largest = values.new_zeros(shape) if empty else values.abs().amax(axis, keepdim=True)
        return _scale(largest, 127)


@dataclass(frozen=True, slots=True)
class Int4:
    """The `int4` format. Codes: uint8, two's complement in the low 4 bits; scales as for int8.

    One scale for `group` elements along the axis; 128 is the usual choice (GPTQ, AWQ).
    """

    group: int = 128
    name: str = "int4"

    @property
    def block(self) -> int:
        return self.group

    @property
    def info(self) -> FormatInfo:
        return FormatInfo(self.name, self.group, "nearest-even")

    @torch.no_grad()
    def quantize(self, x: torch.Tensor, axis: int = -1) -> Quantized:
        axis = resolve_axis(x, axis)
        parts = blocks.split(working(x), axis, self.group)
        scales = _scale(blocks.amax(parts, axis), 7)
        codes = _rounded(parts, scales, 7).nan_to_num(0.0).to(torch.int8).bitwise_and_(15)
        whole = blocks.join(codes.view(torch.uint8), axis, tuple(x.shape))
        return Quantized(self.name, whole, scales.squeeze(axis + 1), axis, tuple(x.shape), x.dtype)

    @torch.no_grad()
    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        check_format(quantized, self.name)
        scales, axis = blocks.placed_scales(quantized, self.group)
        signed = (quantized.codes.to(torch.int32) ^ 8) - 8
        parts = blocks.split(signed, axis, self.group)
        values = parts.to(scales.dtype) * scales.unsqueeze(axis + 1)
        return blocks.join(values, axis, quantized.shape)

    @torch.no_grad()
    def fake_quantize(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        axis = resolve_axis(x, axis)
        parts = blocks.split(working(x), axis, self.group)
        scales = _scale(blocks.amax(parts, axis), 7)
        values = _rounded(parts, scales, 7).mul_(scales)
        return blocks.join(values, axis, tuple(x.shape)).to(x.dtype)


def _scale(largest: torch.Tensor, levels: int) -> torch.Tensor:
    """At least the smallest normal number, so that zeros divide; NaN where not finite."""
    # By a number, CUDA multiplies with its inverse instead, and the last bit differs.
    by = torch.full((), levels, dtype=largest.dtype, device=largest.device)
    scale = (largest / by).clamp_(min=torch.finfo(largest.dtype).tiny)
    return scale.masked_fill_(scale == torch.inf, torch.nan)


def _rounded(values: torch.Tensor, scales: torch.Tensor, levels: int) -> torch.Tensor:
    # Adding 0.0 makes a zero positive: integers know no other.
    return (values / scales).round_().clamp_(-levels, levels).add_(0.0)
