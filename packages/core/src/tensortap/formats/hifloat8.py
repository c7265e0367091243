"""HiFloat8: 8 bits whose prefix says how the rest splits into exponent and mantissa.

Source: Ascend HiFloat8 Format for Deep Learning, arXiv 2409.16626. Three mantissa bits near 1,
none at the lower end of the range 2^-22 .. 2^15.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import torch

from tensortap.formats import compiled, hifloat8_codes
from tensortap.formats.codec import Quantized, check_format, compact, in_float32, working
from tensortap.formats.minifloat import LAYOUT
from tensortap.records import FormatInfo

Rounding = Literal["ta", "hybrid"]
Overflow = Literal["inf", "saturate"]
MAX, SMALLEST, SMALLEST_NORMAL = 2.0**15, 2.0**-22, 2.0**-15


@dataclass(frozen=True, slots=True)
class HiFloat8:
    """The `hifp8` format. Codes: uint8; no scales.

    `rounding="ta"`: nearest, ties away from zero. `"hybrid"`: the same for exponents of -3 to 3,
    else up if the 14 bits after the mantissa are at least the 14 lowest bits of the float32
    (float64 is rounded to float32 first): a cheap, deterministic stand-in for stochastic rounding.
    It needs noise in those low bits: where they are 0, as in every bfloat16 and most float16, the
    rule rounds up always, even a value on the grid.
    `overflow="inf"`: what rounds above 32768 becomes infinite. `"saturate"`: it becomes 32768,
    and NaN becomes 0, as in training.
    """

    rounding: Rounding = "ta"
    overflow: Overflow = "inf"
    name: str = "hifp8"
    block: int | None = None

    @property
    def info(self) -> FormatInfo:
        return FormatInfo(self.name, None, self.rounding)

    @torch.no_grad()
    def quantize(self, x: torch.Tensor, axis: int = -1) -> Quantized:
        codes = self._by_kernel(x, codes=True)
        if codes is None:
            codes = hifloat8_codes.encode(self._round(x).to(torch.float32))
        return Quantized(self.name, codes, None, None, tuple(x.shape), x.dtype)

    @torch.no_grad()
    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        check_format(quantized, self.name)
        wide = quantized.dtype is torch.float64
        values = None
        if compiled.serves(quantized.codes):
            values = compiled.decode(quantized.codes, hifloat8_codes.value_table())
        if values is None:
            values = hifloat8_codes.decode(quantized.codes)
        return values.to(torch.float64 if wide else torch.float32)

    @torch.no_grad()
    def fake_quantize(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        rounded = self._by_kernel(x, codes=False)
        return (self._round(x) if rounded is None else rounded).to(x.dtype)

    def _by_kernel(self, x: torch.Tensor, *, codes: bool) -> torch.Tensor | None:
        if self.rounding != "ta":
            return None
        return compiled.hifloat8(compact(x), saturate=self.overflow == "saturate", codes=codes)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        values = working(x) if self.rounding == "ta" else in_float32(x)
        return _round(values.contiguous(), self.rounding, self.overflow)


def _round(x: torch.Tensor, rounding: Rounding, overflow: Overflow) -> torch.Tensor:
    """Values on the grid, in new memory, for float32 (or, with `ta`, float64) values."""
    integer = LAYOUT[x.dtype][0]
    magnitude = x.view(integer) & torch.iinfo(integer).max
    rounded = _away(magnitude, x.dtype) if rounding == "ta" else _hybrid(magnitude)
    rounded.masked_fill_(magnitude < _pattern(SMALLEST / 2, x.dtype), 0)
    values = rounded.view(x.dtype)
    top = torch.inf if overflow == "inf" else MAX
    values.masked_fill_(values > MAX, top)
    # A zero stays positive: there is no code for -0.0.
    values = torch.where(x < 0, 0.0 - values, values)
    return values.masked_fill_(x.isnan(), torch.nan if overflow == "inf" else 0.0)


def _away(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keep 3, 2, 1 or 0 mantissa bits; half a unit added first makes ties go away from zero."""
    _, mantissa, bias = LAYOUT[dtype]
    drop = _dropped((magnitude >> mantissa) - bias, mantissa)
    half = torch.ones_like(drop) << (drop - 1)
    rounded = (magnitude.clamp(max=_pattern(2 * MAX, dtype)) + half) >> drop << drop
    return rounded.clamp_(min=_pattern(SMALLEST, dtype))


def _hybrid(magnitude: torch.Tensor) -> torch.Tensor:
    """Near 1 as `_away`; else up if the 14 bits that follow are at least the 14 lowest."""
    exponent = (magnitude >> 23) - 127
    drop = _dropped(exponent, 23)
    following = (magnitude >> (drop - 14)) & 0x3FFF
    # Below the smallest value the mantissa's leading 1 is the first of the bits that follow.
    below = (magnitude & 0x7FFFFF) >> 10 | 0x2000
    following = torch.where(exponent == -23, below, following)
    up = following >= (magnitude & 0x3FFF)
    chosen = ((magnitude.clamp(max=_pattern(2 * MAX, torch.float32)) >> drop) + up) << drop
    chosen.clamp_(min=_pattern(SMALLEST, torch.float32))
    chosen.masked_fill_((exponent == -23) & ~up, 0)
    return torch.where(exponent.abs() < 4, _away(magnitude, torch.float32), chosen)


def _dropped(exponent: torch.Tensor, mantissa: int) -> torch.Tensor:
    """How many of the mantissa's bits have no place at this exponent."""
    size = exponent.abs()
    narrower = (size > 3).to(size.dtype).add_(size > 7).add_(size > 15)
    return narrower.add_(mantissa - 3)


def _pattern(value: float, dtype: torch.dtype) -> int:
    """The bits of a positive number."""
    whole, real = ("<i", "<f") if dtype is torch.float32 else ("<q", "<d")
    pattern: int = struct.unpack(whole, struct.pack(real, value))[0]
    return pattern
