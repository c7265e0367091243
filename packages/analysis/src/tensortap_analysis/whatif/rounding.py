"""What rounding to a number format does to values: counted, not assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tensortap import formats
from tensortap.errors import NotSupported
from tensortap.formats import Codec, Quantized


@dataclass(slots=True)
class Tally:
    """Sums over values and their images in a format; weighted ones where values are a model.

    `overflow` counts what lies farther beyond the largest value of its block than rounding would
    take it; it is measured as that largest value. `lost` counts finite values that a NaN or an
    infinity in the same scale made NaN.
    """

    signal: float = 0.0
    noise: float = 0.0
    nonzero: float = 0.0
    underflow: float = 0.0
    overflow: float = 0.0
    lost: float = 0.0

    def add(self, other: Tally) -> None:
        """Count more values."""
        self.signal += other.signal
        self.noise += other.noise
        self.nonzero += other.nonzero
        self.underflow += other.underflow
        self.overflow += other.overflow
        self.lost += other.lost

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise); `None` where all values are 0, -inf where values are lost."""
        if self.lost:
            return -math.inf
        if not self.signal:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


def codec_of(name: str) -> Codec:
    """The codec with its default options; hifp8 overflows to infinity, which can be counted."""
    return formats.get(name)


def scaled_as_a_whole(codec: Codec) -> bool:
    """Does one scale depend on the largest value of the whole tensor?"""
    return codec.name in ("int8", "nvfp4")


@dataclass(frozen=True, slots=True)
class Values:
    """Values to round, [rows, contraction axis], float32 or float64; what all formats ask of them.

    `weights` say how many values each stands for; `largest` is the largest magnitude of the
    tensor that they are cut from, NaN if there is one, or `None` where they are all of it.
    """

    x: torch.Tensor
    largest: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def total(self, numbers: torch.Tensor) -> float:
        """Sum in float64 of numbers or marks, one for each value."""
        if self.weights is not None:
            numbers = numbers * self.weights
        return float(numbers.sum(dtype=torch.float64))


def tally(codec: Codec, values: Values) -> Tally:
    """Round the values to the format and count; raises `NotSupported` for values above 1e150."""
    x = values.x
    quantized = _quantized(codec, values)
    rounded = codec.dequantize(quantized)[: len(x)]
    over = _beyond(codec, quantized, x, rounded)
    limit = formats_max(codec.name) if codec.name in _WITH_INFINITY else torch.finfo(x.dtype).max
    exact = x.double()
    error = exact - (rounded.nan_to_num_(math.nan, limit, -limit) if over.any() else rounded)
    noise = values.total(error.square_())
    lost = 0.0
    if not math.isfinite(noise):
        finite = x.isfinite()
        lost = values.total(finite & rounded.isnan())
        kept = finite & ~rounded.isnan()
        exact, over = exact.masked_fill(~finite, 0), over & kept
        noise, rounded = values.total(error.masked_fill(~kept, 0)), rounded.masked_fill(~kept, 0)
    nonzero = values.total(exact != 0)
    signal = values.total(exact.square())
    if not math.isfinite(signal + noise):
        raise NotSupported("its squares are beyond what float64 holds")
    return Tally(
        signal=signal,
        noise=noise,
        nonzero=nonzero,
        underflow=max(nonzero - lost - values.total(rounded != 0), 0.0),
        overflow=values.total(over),
        lost=lost,
    )


def _quantized(codec: Codec, values: Values) -> Quantized:
    """Codes and scales; one more row that holds the largest value makes the tensor's scale."""
    x = values.x
    if values.largest is not None and scaled_as_a_whole(codec):
        witness = x.new_zeros(1, x.shape[1])
        witness[0, 0] = values.largest
        x = torch.cat([x, witness])
    return codec.quantize(x)


def _beyond(
    codec: Codec, quantized: Quantized, x: torch.Tensor, rounded: torch.Tensor
) -> torch.Tensor:
    """Which values became infinite, or saturated with an error larger than rounding's."""
    # Without infinities of its own a format reaches one where its scale does not fit the dtype.
    infinite = rounded.isinf() & x.isfinite()
    if codec.name in _WITH_INFINITY:
        return infinite
    high, low, half = _extremes(codec.name)
    codes = quantized.codes.view(torch.uint8)[: len(x)]
    size = rounded.abs()
    return infinite | ((codes == high) | (codes == low)) & (x.abs() > size + size * half)


_WITH_INFINITY = ("hifp8", "fp16", "bf16")


@lru_cache
def formats_max(name: str) -> float:
    """The largest value of a format before scaling."""
    return next(row.max for row in formats.table() if row.name == name)


@lru_cache
def _extremes(name: str) -> tuple[int, int, float]:
    """The codes of the largest value and its negative; half the last spacing over that value."""
    codec, largest = codec_of(name), formats_max(name)
    quantized = codec.quantize(torch.tensor([[largest], [-largest]]))
    high, low = quantized.codes.view(torch.uint8).flatten().tolist()
    codes = torch.full_like(quantized.codes.view(torch.uint8), high - 1)
    below = codec.dequantize(replace(quantized, codes=codes.view(quantized.codes.dtype)))
    return high, low, (largest - float(below[0])) / 2 / largest
