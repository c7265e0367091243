"""Floating-point elements of 4 to 8 bits: rounding to the grid, codes, and values of codes.

All in exact bit operations, on any device, without waiting for it. Sources: OCP Microscaling
Formats (MX) v1.0, section 5.3; OCP 8-bit Floating Point v1.0 for E4M3 and E5M2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
"""Of the dtypes computed in: the integer of the same size, mantissa bits, exponent bias."""


@dataclass(frozen=True, slots=True)
class Element:
    """Sign, exponent and mantissa in one code; what is below the largest value and no NaN or Inf.

    The largest exponent belongs to finite values in E4M3 (but for one code), E3M2, E2M3, E2M1.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float
    emax: int
    """Exponent of the largest value."""
    dtype: torch.dtype | None = None
    """Torch's own, with the same codes."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value, and of all subnormal ones."""
        return 1 - self.bias

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (self.emin - self.mantissa_bits)


E4M3 = Element("e4m3", 4, 3, 448.0, 8, torch.float8_e4m3fn)
E5M2 = Element("e5m2", 5, 2, 57344.0, 15, torch.float8_e5m2)
E3M2 = Element("e3m2", 3, 2, 28.0, 4)
E2M3 = Element("e2m3", 2, 3, 7.5, 2)
E2M1 = Element("e2m1", 2, 1, 6.0, 2)


def round_even(x: torch.Tensor, element: Element) -> torch.Tensor:
    """Nearest value of `element`, ties to even, saturated; NaN and the sign of zero stay."""
    return round_to(x, element.emin, element.mantissa_bits, element.max)


def round_to(x: torch.Tensor, emin: int, mantissa_bits: int, limit: float) -> torch.Tensor:
    """Round float32 or float64 to `mantissa_bits`, subnormal below 2^`emin`; clamp to `limit`.

    Adding and subtracting 1.5 times a power of two, so large that its last place is the grid's
    spacing, makes the processor round: once, to nearest, ties to even. NaN stays NaN.
    """
    integer, mantissa, bias = LAYOUT[x.dtype]
    clamped = x.clamp(-limit, limit)
    one = 1 << mantissa
    powers = (clamped.view(integer) & ((2 * bias + 1) * one)).clamp(min=(emin + bias) * one)
    large = powers.add_((mantissa - mantissa_bits) * one + one // 2).view(x.dtype)
    return (clamped + large).sub_(large).copysign_(clamped)


def encode(values: torch.Tensor, element: Element) -> torch.Tensor:
    """Codes (uint8) of float32 values that lie on the grid."""
    if element.dtype is not None:
        return values.to(element.dtype).view(torch.uint8)
    bits = values.view(torch.int32)
    sign = (bits >> 31) & 1
    magnitude = bits & 0x7FFFFFFF
    drop = 23 - element.mantissa_bits
    normal = (magnitude >> drop) - ((127 - element.bias) << element.mantissa_bits)
    subnormal = (values.abs() * (1.0 / element.smallest_subnormal)).to(torch.int32)
    code = torch.where(values.abs() < element.smallest_normal, subnormal, normal)
    return (code | (sign << (element.bits - 1))).to(torch.uint8)


def decode(codes: torch.Tensor, element: Element) -> torch.Tensor:
    """Values (float32) of codes (uint8)."""
    if element.dtype is not None:
        return codes.view(element.dtype).to(torch.float32)
    code = codes.to(torch.int32)
    magnitude = code & ((1 << (element.bits - 1)) - 1)
    rebiased = magnitude + ((127 - element.bias) << element.mantissa_bits)
    normal = (rebiased << (23 - element.mantissa_bits)).view(torch.float32)
    subnormal = magnitude.to(torch.float32) * element.smallest_subnormal
    value = torch.where(magnitude < (1 << element.mantissa_bits), subnormal, normal)
    return torch.where(code >> (element.bits - 1) == 1, -value, value)


@cache
def value_table(element: Element) -> torch.Tensor:
    """The values of all bytes, float32 on the CPU, for the compiled kernel; bits above are 0."""
    return decode(torch.arange(256, dtype=torch.uint8, device="cpu"), element)
