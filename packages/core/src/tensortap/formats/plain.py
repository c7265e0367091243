"""float16 and bfloat16 as formats: no scale, the code is the value itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tensortap.formats.codec import Quantized, check_format, working
from tensortap.formats.minifloat import round_to
from tensortap.records import FormatInfo

_GRID = {torch.float16: (-14, 10, 2.0**17), torch.bfloat16: (-126, 7, 2.0**130)}
"""Smallest normal exponent, mantissa bits, and a magnitude that is certainly infinite."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A 16-bit dtype of torch: nearest, ties to even, overflow becomes infinite (IEEE 754)."""

    name: str
    dtype: torch.dtype
    block: int | None = None

    @property
    def info(self) -> FormatInfo:
        return FormatInfo(self.name, None, "nearest-even")

    @torch.no_grad()
    def quantize(self, x: torch.Tensor, axis: int = -1) -> Quantized:
        codes = self._cast(x)
        return Quantized(self.name, codes, None, None, tuple(x.shape), x.dtype)

    @torch.no_grad()
    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        check_format(quantized, self.name)
        wide = quantized.dtype is torch.float64
        return quantized.codes.to(torch.float64 if wide else torch.float32)

    @torch.no_grad()
    def fake_quantize(self, x: torch.Tensor, axis: int = -1) -> torch.Tensor:
        codes = self._cast(x)
        return codes if codes.dtype is x.dtype else codes.to(torch.float32).to(x.dtype)

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        """Contiguous, in new memory; float64 is rounded once, where torch goes by float32."""
        values = working(x)
        if values.dtype is torch.float64:
            values = round_to(values, *_GRID[self.dtype])
        return values.to(self.dtype, memory_format=torch.contiguous_format, copy=True)
