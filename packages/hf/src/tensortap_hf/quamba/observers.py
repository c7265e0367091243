"""What calibration remembers of a tensor: its largest magnitude, one sample after the other."""

from __future__ import annotations

import math
from typing import Protocol

import torch

ALPHA = 0.9995
"""The quantile of |x| that is the maximum of a percentile observer, unless told otherwise."""

_SMOOTHING = 0.01


class Observer(Protocol):
    """Sees one tensor per sample; `maximum` is what its scale is made from."""

    maximum: float | None
    """`None` until the first sample."""

    def see(self, x: torch.Tensor) -> None:
        """Take one sample into account."""


class MinMax:
    """The largest |x| of all samples."""

    def __init__(self) -> None:
        self.maximum: float | None = None

    def see(self, x: torch.Tensor) -> None:
        """Take one sample into account."""
        self.maximum = max(self.maximum or 0.0, float(x.abs().max()))


class Percentile:
    """The alpha-quantile of |x| of the first sample, moved a little towards that of each later."""

    def __init__(self, alpha: float) -> None:
        self.maximum: float | None = None
        self._alpha = alpha

    def see(self, x: torch.Tensor) -> None:
        """Take one sample into account."""
        current = quantile(x.abs(), self._alpha)
        if self.maximum is None:
            self.maximum = current
        else:
            self.maximum += _SMOOTHING * (current - self.maximum)


def quantile(x: torch.Tensor, alpha: float) -> float:
    """The alpha-quantile of all values, interpolated linearly between its two neighbours.

    For tensors of any size; `torch.quantile` fails above 16,777,216 elements, and rounds the
    position of the quantile to float32.
    """
    position = alpha * (x.numel() - 1)
    below = math.floor(position)
    # Quantiles near 1 need only the few largest values.
    largest = torch.topk(x.reshape(-1).float(), x.numel() - below).values.double()
    low, high = largest[-1], largest[-2] if largest.numel() > 1 else largest[-1]
    return float(low + (position - below) * (high - low))
