"""Boxes that a tensor is read in, so that its size does not matter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

Box = tuple[tuple[int, int], ...]
"""(start, stop) on every axis."""


def boxes(shape: Sequence[int], limit: int, keep: int | None = None) -> Iterator[Box]:
    """Boxes of at most about `limit` elements that cover the shape; axis `keep` is never cut."""
    steps = [max(size, 1) for size in shape]
    for axis in range(len(steps)):
        inside = 1
        for step in steps:
            inside *= step
        if axis != keep and inside > limit:
            steps[axis] = max(1, limit * steps[axis] // inside)
    starts = (range(0, max(size, 1), step) for size, step in zip(shape, steps, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(
            (start, min(start + step, size))
            for start, step, size in zip(corner, steps, shape, strict=True)
        )
