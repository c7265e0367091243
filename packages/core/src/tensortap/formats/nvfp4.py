"""NVFP4: blocks of 16 E2M1 elements with an E4M3 scale each, and one float32 scale for all.

As NVIDIA's kernels and torchao compute it, all in float32: g = amax(x) / (448 * 6), the scale of
a block is E4M3(amax(block) / 6 / g), at least 2^-6, and an element E2M1(x * ((1 / g) / scale)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensortap.errors import ConfigError
from tensortap.formats import blocks, compiled
from tensortap.formats.codec import Quantized, check_format, compact, in_float32, resolve_axis
from tensortap.formats.minifloat import E2M1, E4M3, decode, encode, round_even, value_table
from tensortap.records import FormatInfo

BLOCK = 16
_LEAST_TENSOR_SCALE = 2.0**-120
"""So that its inverse over the least block scale is finite; also the scale of zeros."""


@dataclass(frozen=True, slots=True)
class NVFP4:
    """The `nvfp4` format. Codes: uint8; scales: float8_e4m3fn; tensor_scale: float32, 0-d.

    float64 is rounded to float32 first. A NaN or an infinity makes the tensor's scale NaN, and
    with it every value.
    """

    name: str = "nvfp4"
    block: int = BLOCK

    @property
    def info(self) -> FormatInfo:
        return FormatInfo(self.name, self.block, "nearest-even")

    @torch.no_grad()
    def quantize(self, x: torch.Tensor, axis: int = -1) -> Quantized:
        axis, values = resolve_axis(x, axis), _at_most_32_bits(x)
        whole = tensor_scale(_largest(values))
        found = compiled.encode_blocks(values, axis, E2M1, self.block, whole)
        if found is None:
            on_grid, scales = self._round(values, axis, whole)
            codes = blocks.join(encode(on_grid.nan_to_num(0.0), E2M1), axis, tuple(x.shape))
            found = codes, encode(scales, E4M3).squeeze(axis + 1)
        codes, stored = found[0], found[1].view(torch.float8_e4m3fn)
        return Quantized(self.name, codes, stored, axis, tuple(x.shape), x.dtype, whole)

    @torch.no_grad()
    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        check_format(quantized, self.name)
        stored, axis = blocks.placed_scales(quantized, self.block)
        if quantized.tensor_scale is None:
            raise ConfigError("codes of nvfp4 have no values without their tensor_scale.")
        codes, scales = quantized.codes, quantized.tensor_scale * stored.to(torch.float32)
        values = None
        if compiled.serves(codes):
            values = compiled.decode(codes, value_table(E2M1), scales, axis, self.block)
        if values is None:
            values = decode(blocks.split(codes, axis, self.block), E2M1)
            values = blocks.join(values * scales.unsqueeze(axis + 1), axis, quantized.shape)
        return values.to(torch.float64 if quantized.dtype is torch.float64 else torch.float32)

    @torch.no_grad()
    def fake_quantize(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        axis, values = resolve_axis(x, axis), _at_most_32_bits(x)
        whole = tensor_scale(_largest(values))
        rounded = compiled.round_blocks(values, axis, E2M1, self.block, whole)
        if rounded is None:
            on_grid, scales = self._round(values, axis, whole)
            rounded = blocks.join(on_grid.mul_(whole * scales), axis, tuple(x.shape))
        return rounded.to(x.dtype)

    def _round(
        self, values: torch.Tensor, axis: int, whole: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Elements and block scales on their grids, float32, in torch operations."""
        parts = blocks.split(values.float(), axis, self.block)
        scales = block_scales(blocks.amax(parts, axis), whole)
        return round_even(parts * (whole.reciprocal() / scales), E2M1), scales


def tensor_scale(largest: torch.Tensor) -> torch.Tensor:
    """The scale of the whole tensor from its largest magnitude (0-d); NaN if that is not finite."""
    whole = _divided(largest, E4M3.max * E2M1.max)
    return whole.clamp_(min=_LEAST_TENSOR_SCALE).masked_fill_(largest == torch.inf, torch.nan)


def block_scales(largest: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Scales of the blocks, from their largest magnitudes, on the E4M3 grid; normal values only."""
    wanted = (_divided(largest, E2M1.max) / whole).nan_to_num(E4M3.max)
    return round_even(wanted.clamp_(E4M3.smallest_normal, E4M3.max), E4M3)


def _at_most_32_bits(x: torch.Tensor) -> torch.Tensor:
    return in_float32(x) if x.dtype is torch.float64 else compact(x)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, float32, 0-d; NaN if there is one."""
    if values.numel() == 0:
        return values.new_zeros((), dtype=torch.float32)
    low, high = torch.aminmax(values)
    return torch.maximum(low.neg(), high).float()


def _divided(values: torch.Tensor, by: float) -> torch.Tensor:
    # By a number, CUDA multiplies with its inverse instead, and the last bit differs.
    return values / torch.full((), by, device=values.device)
