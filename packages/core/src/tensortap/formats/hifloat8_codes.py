"""The 256 codes of HiFloat8: sign, a prefix of 2 to 4 bits, then exponent and mantissa.

    prefix  exponent bits  mantissa bits  |exponent|
    11      4              1              8 .. 15
    10      3              2              4 .. 7
    01      2              3              2, 3
    001     1              3              1
    0001    0              3              0
    0000    none           3              denormal: 2^(M - 23) for M = 1 .. 7, 0 for M = 0

The first bit of an exponent is its sign, and its magnitude has a leading 1 that is not stored.
0x6F and 0xEF are the infinities (49152 would be there), 0x80 is NaN.
Source: arXiv 2409.16626, section 3.
"""

from __future__ import annotations

from functools import cache

import torch

NAN, INFINITY = 0x80, 0x6F
_PREFIXES = (0x10, 0x20, 0x40, 0x60)
"""From which code (without its sign) on the exponent has 1, 2, 3, 4 bits; none from 0x08 on."""


def encode(values: torch.Tensor) -> torch.Tensor:
    """Codes (uint8) of float32 values that lie on the grid, infinities and NaN among them."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    exponent, mantissa = (magnitude >> 23) - 127, (magnitude >> 20) & 7
    size = exponent.abs()
    width = _count_reached(size, (1, 2, 4, 8))
    places = _mantissa_bits(width)
    one = torch.ones_like(width)
    prefix = torch.where(width == 4, 0x60, 8 * (one << width))
    leading = (one << width) >> 1
    field = (exponent < 0) * leading + size - leading
    code = prefix | (field << places) | (mantissa >> (3 - places))
    code = torch.where(exponent < -15, (exponent + 23).clamp(min=0), code)
    code = code.masked_fill_(values.isinf(), INFINITY) | ((bits >> 24) & 0x80)
    return code.masked_fill_(values.isnan(), NAN).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Values (float32) of codes (uint8); every code has one."""
    code = codes.to(torch.int32)
    low = code & 0x7F
    width = _count_reached(low, _PREFIXES)
    places = _mantissa_bits(width)
    leading = (torch.ones_like(width) << width) >> 1
    field = (low >> places) & ((leading * 2 - 1).clamp(min=0))
    negative = field >= leading
    size = leading + field - negative * leading
    exponent = torch.where(negative, -size, size)
    mantissa = (low << (3 - places)) & 7
    exponent, mantissa = _denormal(low, exponent, mantissa)
    values = (((exponent + 127) << 23) | (mantissa << 20)).view(torch.float32)
    values = values.masked_fill_(low == 0, 0.0).masked_fill_(low == INFINITY, torch.inf)
    values = torch.where(code > 0x7F, -values, values)
    return values.masked_fill_(code == NAN, torch.nan)


@cache
def value_table() -> torch.Tensor:
    """The values of all codes, on the CPU, for the compiled kernel."""
    return decode(torch.arange(256, dtype=torch.uint8, device="cpu"))


def _denormal(
    low: torch.Tensor, exponent: torch.Tensor, mantissa: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exponent and mantissa, replaced for the codes without an exponent field."""
    denormal = low < 8
    return torch.where(denormal, low - 23, exponent), mantissa.masked_fill(denormal, 0)


def _mantissa_bits(width: torch.Tensor) -> torch.Tensor:
    """3 beside an exponent field of up to 2 bits, then one less for each more."""
    return 3 - (width - 2).clamp(min=0)


def _count_reached(values: torch.Tensor, thresholds: tuple[int, ...]) -> torch.Tensor:
    reached = torch.zeros_like(values)
    for threshold in thresholds:
        reached += values >= threshold
    return reached
