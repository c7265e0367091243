"""int8 arithmetic as Quamba does it: symmetric codes, exact int32 products, two roundings.

Codes are in [-128, 127], scales are absmax / 127. Weights, norm outputs and products round half
to even; what the convolution, the scan and the Hadamard transform store rounds half away from
zero, as `roundf` in their CUDA kernels does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tensortap.records import FormatInfo

HALF_EVEN = FormatInfo("int8", rounding="nearest-even")
HALF_AWAY = FormatInfo("int8", rounding="nearest-away")
"""What a record says about codes: the format, and how values became codes."""

LEVELS = 127
_FLOOR = 1e-5
"""An absmax below this counts as this, so that a tensor of zeros has a scale."""

_EXACT = 1024
"""A sum of so many products of codes is at most 2**24: float32 holds it, whatever the order."""


@dataclass(frozen=True, slots=True)
class Codes:
    """int8 codes and the one scale of their tensor: the values are codes * scale."""

    codes: torch.Tensor
    scale: float
    format: FormatInfo = HALF_EVEN

    def values(self) -> torch.Tensor:
        """The tensor on the grid; float32."""
        return self.codes.float() * self.scale

    def like(self, codes: torch.Tensor) -> Codes:
        """Other codes of the same scale."""
        return Codes(codes, self.scale, self.format)


@dataclass(frozen=True, slots=True)
class OnGrid:
    """Float values that are codes * scale: what a kernel dequantises for the next one."""

    data: torch.Tensor
    scale: float
    format: FormatInfo

    def values(self) -> torch.Tensor:
        """The values themselves; float32."""
        return self.data


Value = Codes | OnGrid | torch.Tensor
"""How a tensor is handed on: as codes, as float values on their grid, or as any float values."""


def values(value: Value) -> torch.Tensor:
    """The numbers that a tensor stands for; float32."""
    return value.float() if isinstance(value, torch.Tensor) else value.values()


def scale_of(absmax: float) -> float:
    """The scale for values up to `absmax`; as float32 holds it."""
    return single(max(absmax, _FLOOR) / LEVELS)


def single(value: float) -> float:
    """A number as float32 holds it: what a kernel's argument is."""
    return float(torch.tensor(value, dtype=torch.float32))


def quantize_weight(weight: torch.Tensor) -> Codes:
    """One scale for the whole tensor, half even."""
    values = weight.detach().float()
    return half_even(values, scale_of(float(values.abs().max()) if values.numel() else 0.0))


def half_even(values: torch.Tensor, scale: float) -> Codes:
    """Codes of float values: round(x / scale), ties to even, saturated."""
    return Codes(_saturated((values.float() / scale).round_()), scale, HALF_EVEN)


def half_away(values: torch.Tensor, scale: float) -> Codes:
    """The same, with ties away from zero."""
    ratio = values.float() / scale
    whole = ratio.trunc()
    # The fraction is exact, so half is told from just below half; adding 0.5 would round.
    beyond = (ratio - whole).abs_() >= 0.5
    return Codes(_saturated(whole.add_(beyond * ratio.sign())), scale, HALF_AWAY)


def rescaled(product: torch.Tensor, scale: float, to: float) -> Codes:
    """An int32 product whose values are product * scale, as codes of scale `to`; half even."""
    return Codes(_saturated((product.float() * single(scale / to)).round_()), to, HALF_EVEN)


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right.T` of int8 codes [..., k] and [n, k], summed without error; int32 [..., n]."""
    rows = left.reshape(-1, left.shape[-1]).contiguous()
    # With k = 1 the strides of a transposed matrix are those of a plain one, which _int_mm takes
    # it for.
    fits = rows.is_cpu and rows.shape[1] > 1 and _int_mm_is_exact()
    product = _int_mm if fits else _float_mm
    return product(rows, right).reshape(*left.shape[:-1], right.shape[0])


def _int_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(left, right.T)


def _float_mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """In float32 over pieces of k so short that no partial sum needs rounding."""
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for a, b in zip(_pieces(left), _pieces(right), strict=True):
        total += (a.float() @ b.float().T).to(torch.int32)
    return total


def _pieces(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(codes, _EXACT, dim=-1)


@functools.cache
def _int_mm_is_exact() -> bool:
    """Is torch's own product there, and right? The extreme codes tell.

    Some CPUs add pairs of products in 16 bits and saturate; an older torch has it on GPUs alone.
    """
    generator = torch.Generator().manual_seed(0)
    for extreme in (-128, 127):
        left = torch.full((40, 192), extreme, dtype=torch.int8)
        right = torch.randint(-128, 128, (48, 192), generator=generator).to(torch.int8)
        for other in (right, left):
            try:
                product = _int_mm(left, other)
            except (AttributeError, RuntimeError):
                return False
            if not torch.equal(product, _float_mm(left, other)):
                return False
    return True


def _saturated(whole: torch.Tensor) -> torch.Tensor:
    return whole.clamp_(-LEVELS - 1, LEVELS).to(torch.int8)
