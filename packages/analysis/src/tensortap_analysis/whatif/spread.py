"""Where the values of an exponent histogram may lie between two powers of two."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are even and never on the grid of a number format."""


def spread(
    exponents: Mapping[int, int], absmax: float, density: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes [octave, density], ascending, and how many values each stands for (float64).

    Inside an octave the density changes exponentially, at the rate at which it does between the
    middles of its neighbours: a flat one stays flat, the tail of a normal one falls ever faster.
    The magnitudes lie on the grid of `dtype`: rounding bfloat16 values to a wider format must cost
    nothing.
    """
    ordered = sorted(exponents)
    counts = torch.tensor([exponents[e] for e in ordered], dtype=torch.float64)
    low = torch.tensor([2.0**e for e in ordered], dtype=torch.float64)
    high = (2 * low).clamp(max=max(absmax, 2.0 ** ordered[-1]))
    steps = torch.arange(density + 1, dtype=torch.float64) / density
    edges = low[:, None] + (high - low)[:, None] * steps
    rate = _rates(ordered, counts / (high - low).clamp(min=1e-300), (low + high) / 2)
    middles = (edges[:, 1:] + edges[:, :-1]) / 2 - low[:, None]
    inside = (rate[:, None] * middles).clamp(-50, 50).exp()
    weights = counts[:, None] * inside / inside.sum(1, keepdim=True)
    jitter = (torch.arange(1, density + 1, dtype=torch.float64) * _GOLDEN) % 1
    points = edges[:, :-1] + (edges[:, 1:] - edges[:, :-1]) * jitter
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return points.to(dtype).to(wide), weights


def _rates(ordered: list[int], density: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
    """The slope d log(density) / dx in each octave; 0 beside a gap.

    Between two octaves it is the slope from middle to middle, in an octave the mean of both
    sides. The last one has no octave above it: there the slope goes on changing as it did.
    """
    if len(ordered) == 1:
        return torch.zeros(1, dtype=torch.float64)
    slope = density.log().diff() / middle.diff()
    joined = torch.tensor([b == a + 1 for a, b in itertools.pairwise(ordered)])
    slope = torch.where(joined, slope, 0.0)
    inner = (slope[1:] + slope[:-1]) / 2
    last = slope[-1:] + (slope[-1:] - slope[-2:-1]) / 2 if len(slope) > 1 else slope
    last = torch.minimum(last, torch.zeros(())) if slope[-1] < 0 else slope[-1:]
    return torch.cat([slope[:1], inner, last])
