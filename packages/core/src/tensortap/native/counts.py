"""What is counted of pairs: leading bits of their differences, values looked for, and codes."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

KEY_SHIFT, ROW_SHIFT = 45, 52
"""A key is what remains of a float64 above the first of these bits, a row above the second."""
ROWS, ROW = 2048, 128
"""Rows without the sign, and the keys in each."""
TARGETS, NEXT_BITS = 8, 12
"""Prefixes `select` looks for at once, and how many further bits it counts them by."""
PAIRS_OF_CODES = 1 << 16

FINE = 1 << 14
"""Values from which on it is worth counting keys; fewer are collected by the row."""
Ints = npt.NDArray[np.int64]


def blank(count: int) -> Ints:
    """Zeros that take no memory before they are written to."""
    return np.frombuffer(mmap.mmap(-1, count * 8), dtype=np.int64)


class Histogram:
    """How often values have each sign and exponent: `rows`; the positive ones first.

    `keys` tells apart 128 mantissas a row, and before that values with nothing below those bits
    (`keys[0]`) from others (`keys[1]`). It is `None` where the values are too few for it.
    """

    def __init__(self, values: int) -> None:
        fine = values >= FINE
        self.keys = blank(4 * ROWS * ROW).reshape(2, 2, ROWS, ROW) if fine else None
        self.rows = np.zeros((2, ROWS), dtype=np.int64)


class Histograms:
    """Of so many differences, and of relative ones."""

    def __init__(self, values: int) -> None:
        self.absolute, self.relative = Histogram(values), Histogram(values)


def _no_counts() -> Ints:
    return np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class Quest:
    """Prefixes of the bits from `shift` on, and what has been found of the values with them.

    `found` holds the bits of `taken` values, unordered. Where it is `None` they are counted by
    their next bits, for each thread and prefix: in `ones` and `zeros` are the bits that are set,
    and that are not, in any of the values counted.
    """

    shift: int
    prefixes: Sequence[int]
    found: Ints | None
    threads: int
    taken: int = 0
    counts: Ints = field(default_factory=_no_counts)
    ones: Ints = field(default_factory=_no_counts)
    zeros: Ints = field(default_factory=_no_counts)

    def __post_init__(self) -> None:
        if self.found is None:
            shape = self.threads, len(self.prefixes), 1 << NEXT_BITS
            self.counts, self.ones, self.zeros = (np.zeros(shape, dtype=np.int64) for _ in range(3))


class CodePairs:
    """How often each pair of codes occurs, and its first place: by threads, and by the code of
    the reference times 256 plus that of the other.

    Places mean something only where `times` is not 0. `total` pairs have been counted.
    """

    def __init__(self, threads: int) -> None:
        self.times = blank(threads * PAIRS_OF_CODES).reshape(threads, PAIRS_OF_CODES)
        self.places = blank(threads * PAIRS_OF_CODES).reshape(threads, PAIRS_OF_CODES)
        self.total = 0
