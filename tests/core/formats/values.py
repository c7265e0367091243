"""Numbers that rounding goes wrong at, and comparing bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 2.0**-126, -(2.0**-126)]


def magnitudes(count: int, low: int = -149, high: int = 127, seed: int = 1) -> Array:
    """float32 of both signs with exponents spread evenly, and the special ones."""
    draw = np.random.default_rng(seed)
    exponents = draw.integers(low, high + 1, count).astype(np.float64)
    signs = draw.choice([-1.0, 1.0], count)
    drawn = np.ldexp(signs * draw.uniform(1, 2, count), exponents.astype(int))
    with np.errstate(over="ignore", under="ignore"):
        return np.concatenate([drawn.astype(np.float32), np.array(SPECIAL, np.float32)])


def around(points: Iterable[float], dtype: type[np.floating[Any]] = np.float32) -> Array:
    """Each point and its neighbours in `dtype` on both sides, with both signs."""
    exact = np.array(sorted(set(points)), dtype)
    with np.errstate(over="ignore"):
        sides = [exact, np.nextafter(exact, dtype(np.inf)), np.nextafter(exact, dtype(-np.inf))]
    found = np.concatenate(sides)
    return np.concatenate([found, -found])


def edges(grid: Iterable[float]) -> list[float]:
    """The finite values of a grid and the midpoints between them: where rounding decides."""
    values = sorted({abs(value) for value in grid if math.isfinite(value)})
    middles = [(low + high) / 2 for low, high in itertools.pairwise(values)]
    return values + middles


def assert_same(found: torch.Tensor | Array, wanted: torch.Tensor | Array) -> None:
    """Equal values, equal signs of zero, NaN in the same places."""
    left, right = (np.asarray(_array(side), np.float64) for side in (found, wanted))
    assert left.shape == right.shape
    differ = ~((left == right) & (np.signbit(left) == np.signbit(right)))
    differ &= ~(np.isnan(left) & np.isnan(right))
    at = np.argwhere(differ)
    assert not at.size, f"{len(at)} differ, first at {at[0]}: {left[differ][0]}, {right[differ][0]}"


def _array(side: torch.Tensor | Array) -> Array:
    return side.double().numpy() if isinstance(side, torch.Tensor) else side
