"""The MX formats: blocks of 32 small floats that share a power of two.

Source: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3. The shared scale is
2^(floor(log2(amax)) - emax), clamped to 2^-127 .. 2^127, stored as E8M0 (bias 127, 255 is NaN);
elements are rounded to nearest, ties to even, and saturate. What the standard leaves open: a
block with NaN *or infinity* in it gets the NaN scale, so all its values become NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensortap.formats import blocks, compiled
from tensortap.formats.codec import Quantized, check_format, compact, resolve_axis, working
from tensortap.formats.minifloat import (
    LAYOUT,
    Element,
    decode,
    encode,
    round_even,
    value_table,
)
from tensortap.records import FormatInfo

BLOCK = 32
NAN_SCALE = 255


@dataclass(frozen=True, slots=True)
class MX:
    """An MX format. Codes: float8 for the 8-bit elements, else uint8; scales: uint8 (E8M0)."""

    name: str
    element: Element
    block: int = BLOCK

    @property
    def info(self) -> FormatInfo:
        return FormatInfo(self.name, self.block, "nearest-even")

    @torch.no_grad()
    def quantize(self, x: torch.Tensor, axis: int = -1) -> Quantized:
        axis, values = resolve_axis(x, axis), compact(x)
        found = compiled.encode_blocks(values, axis, self.element, self.block)
        codes, scales = found or self._encode(working(values), axis)
        codes = codes.view(self.element.dtype or torch.uint8)
        return Quantized(self.name, codes, scales, axis, tuple(x.shape), x.dtype)

    @torch.no_grad()
    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        check_format(quantized, self.name)
        stored, axis = blocks.placed_scales(quantized, self.block)
        codes = quantized.codes.view(torch.uint8)
        wide = quantized.dtype is torch.float64
        dtype = torch.float64 if wide else torch.float32
        scales = power_of_two(stored.to(torch.int32), dtype)
        if not wide and compiled.serves(codes):
            found = compiled.decode(codes, value_table(self.element), scales, axis, self.block)
            assert found is not None
            return found
        values = decode(blocks.split(codes, axis, self.block), self.element).to(dtype)
        return blocks.join(values * scales.unsqueeze(axis + 1), axis, quantized.shape)

    @torch.no_grad()
    def fake_quantize(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        axis, values = resolve_axis(x, axis), compact(x)
        rounded = compiled.round_blocks(values, axis, self.element, self.block)
        if rounded is None:
            rounded = self._fake_quantize(working(values), axis)
        return rounded.to(x.dtype)

    def _encode(self, values: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and codes of scales in torch operations, for every device and dtype."""
        parts = blocks.split(values, axis, self.block)
        scales = shared_scales(parts, axis, self.element)
        on_grid = round_even(parts * power_of_two(254 - scales, parts.dtype), self.element)
        on_grid = torch.where(scales == NAN_SCALE, torch.zeros_like(on_grid), on_grid)
        codes = encode(on_grid.to(torch.float32), self.element)
        codes = blocks.join(codes, axis, tuple(values.shape))
        return codes, scales.squeeze(axis + 1).to(torch.uint8)

    def _fake_quantize(self, values: torch.Tensor, axis: int) -> torch.Tensor:
        """Values on the grid, in the same way."""
        parts = blocks.split(values, axis, self.block)
        scales = shared_scales(parts, axis, self.element)
        on_grid = round_even(parts * power_of_two(254 - scales, parts.dtype), self.element)
        on_grid.mul_(power_of_two(scales, parts.dtype))
        return blocks.join(on_grid, axis, tuple(values.shape))


def shared_scales(parts: torch.Tensor, axis: int, element: Element) -> torch.Tensor:
    """The biased exponent of each block's scale, 0 .. 254 or 255 (NaN), as int32."""
    integer, mantissa, bias = LAYOUT[parts.dtype]
    largest = blocks.amax(parts, axis)
    power = (largest.view(integer) >> mantissa).sub_(bias + element.emax).clamp(-127, 127)
    power = power.to(torch.int32).add_(127)
    return power.masked_fill_(~largest.isfinite(), NAN_SCALE)


def power_of_two(biased: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2^(biased - 127), exactly (2^-127 is subnormal in float32); NaN for 255."""
    if dtype is torch.float64:
        wide = ((biased.to(torch.int64) + (1023 - 127)) << 52).view(torch.float64)
        return wide.masked_fill_(biased == NAN_SCALE, torch.nan)
    special = (biased == 0) | (biased == NAN_SCALE)
    return ((biased << 23) | (special.to(torch.int32) << 22)).view(torch.float32)
