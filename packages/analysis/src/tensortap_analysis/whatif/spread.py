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

    The logarithm of the share of values above x is known at every power of two; between them it
    is interpolated by a monotone cubic. The magnitudes lie on the grid of `dtype`: rounding
    bfloat16 values to a wider format must cost nothing.
    """
    ordered = sorted(exponents)
    counts = torch.tensor([exponents[e] for e in ordered], dtype=torch.float64)
    low = torch.tensor([2.0**e for e in ordered], dtype=torch.float64)
    high = (2 * low).clamp(max=max(absmax, 2.0 ** ordered[-1]))
    steps = torch.arange(density + 1, dtype=torch.float64) / density
    edges = low[:, None] + (high - low)[:, None] * steps
    above = _survival(ordered, counts, low, high, edges)
    inside = (above[:, :-1] - above[:, 1:]).clamp(min=0)
    inside[inside.sum(1) == 0] = 1.0  # an octave that ends where it begins: all at one place
    weights = counts[:, None] * inside / inside.sum(1, keepdim=True)
    jitter = (torch.arange(1, density + 1, dtype=torch.float64) * _GOLDEN) % 1
    points = edges[:, :-1] + (edges[:, 1:] - edges[:, :-1]) * jitter
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return points.to(dtype).to(wide), weights


def _survival(
    ordered: list[int],
    counts: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    edges: torch.Tensor,
) -> torch.Tensor:
    """The share of values above each edge; octaves that follow each other are joined smoothly."""
    total = counts.sum()
    tail = counts.flip(0).cumsum(0).flip(0)
    start = (tail / total).log()
    # The largest of n values has about half a value's share above it.
    end = (torch.cat([tail[1:], tail.new_tensor([0.5])]) / total).log()
    rise = (end - start) / (high - low).clamp(min=1e-300)
    joined = torch.tensor([b == a + 1 for a, b in itertools.pairwise(ordered)])
    left, right = rise.clone(), rise.clone()
    if len(ordered) > 1:
        both = torch.where(joined, _between(rise, high - low), 0.0)
        right[:-1] = torch.where(joined, both, rise[:-1])
        left[1:] = torch.where(joined, both, rise[1:])
    # Where the density still changes at the ends, a straight line would bend the other way.
    right[-1] = torch.minimum(rise[-1], 2 * rise[-1] - left[-1]).clamp(min=3 * float(rise[-1]))
    return _cubic(edges, low, high, (start, end), (left, right)).exp()


def _between(rise: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Slopes at inner knots: the weighted harmonic mean (Fritsch and Butland, 1984)."""
    one, two = rise[:-1], rise[1:]
    before, after = width[:-1], width[1:]
    first, second = 2 * after + before, after + 2 * before
    mean = (first + second) / (first / one + second / two)
    return torch.where(one * two > 0, mean, 0.0)


def _cubic(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    values: tuple[torch.Tensor, torch.Tensor],
    slopes: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Hermite's cubic on each row's interval."""
    width = (high - low)[:, None]
    t = torch.where(width > 0, (x - low[:, None]) / width.clamp(min=1e-300), 0.0)
    start, end = (value[:, None] for value in values)
    left, right = (slope[:, None] * width for slope in slopes)
    square, cube = t * t, t * t * t
    return (
        (2 * cube - 3 * square + 1) * start
        + (cube - 2 * square + t) * left
        + (3 * square - 2 * cube) * end
        + (cube - square) * right
    )
