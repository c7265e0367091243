"""How often each code of a matrix of 8 or 16 bits occurs.

All that is asked of its values one by one follows from that exactly: statistics, exponents,
outliers, what formats with one scale cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap import native
from tensortap.native.surveying import CODE_TABLES
from tensortap.records import Statistics
from tensortap_analysis.weights.measures.values import Values

_MOST = 1 << 31
"""Values whose counts fit the kernel's tables."""
Doubles = npt.NDArray[np.float64]


def few(dtype: torch.dtype) -> bool:
    """Whether a dtype has so few codes that counting them is worth it."""
    return dtype.itemsize <= 2


class Codes:
    """Counts of the codes of one dtype; pieces are added, then it is asked."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._kernel = native.library() if dtype.itemsize == 2 else None
        self._counts = np.zeros(1 << 8 * dtype.itemsize, np.int64)
        self._tables = np.zeros(CODE_TABLES if self._kernel else 0, np.uint32)
        self._added = 0

    def add(self, piece: torch.Tensor) -> None:
        """Count a contiguous piece; not after the first question."""
        if self._kernel is None:
            words = piece.reshape(-1).view(_word(self._dtype)).numpy()
            unsigned = words.view(f"u{words.itemsize}")
            self._counts += np.bincount(unsigned, minlength=len(self._counts))
            return
        self._added += piece.numel()
        if self._added > _MOST:
            self._flush()
            self._added = piece.numel()
        self._kernel.surveying.codes(piece, self._tables)

    def _flush(self) -> None:
        if self._kernel is not None:
            self._counts += self._tables.sum(0, dtype=np.int64)
            self._tables[:] = 0

    @cached_property
    def _found(self) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
        """Values in float32, ascending by code, NaN and infinities included; and their counts."""
        self._flush()
        codes = np.flatnonzero(self._counts)
        signed = codes.astype(f"u{self._dtype.itemsize}").view(f"i{self._dtype.itemsize}")
        stored = torch.from_numpy(signed).view(self._dtype)
        return stored.to(torch.float32), self._counts[codes]

    @cached_property
    def values(self) -> Values:
        """The finite values that occur, and how many each stands for."""
        x, counts = self._found
        finite = x.isfinite()
        return Values(x[finite], torch.from_numpy(counts).to(torch.float64)[finite])

    @cached_property
    def statistics(self) -> Statistics:
        """As `tensortap.stats` defines them, without leading values and exponents."""
        x, counts = self._found
        kinds = (x.isnan(), x == math.inf, x == -math.inf, x == 0)
        nan, posinf, neginf, zero = (int(counts[kind.numpy()].sum()) for kind in kinds)
        total = int(counts.sum())
        moments = _moments(self.values, total - nan - posinf - neginf)
        return Statistics(total, nan, posinf, neginf, zero, **moments)

    @cached_property
    def exponents(self) -> Mapping[int, int]:
        """How many nonzero finite values have each power of two."""
        x, counts = _numpy(self.values)
        powers = np.frexp(x)[1] - 1
        there = x != 0
        found, inverse = np.unique(powers[there], return_inverse=True)
        sums = np.bincount(inverse, weights=counts[there], minlength=len(found))
        return dict(zip(found.tolist(), sums.astype(np.int64).tolist(), strict=True))


def _word(dtype: torch.dtype) -> torch.dtype:
    return torch.int16 if dtype.itemsize == 2 else torch.uint8


def _numpy(values: Values) -> tuple[Doubles, Doubles]:
    assert values.counts is not None
    return values.x.numpy().astype(np.float64), values.counts.numpy()


def _moments(values: Values, count: int) -> dict[str, Any]:
    names = ("min", "max", "absmax", "mean", "std", "rms", "l1", "l2")
    if not count:
        return dict.fromkeys(names)
    x, counts = _numpy(values)
    mean = float((x * counts).sum()) / count
    squares, l1 = float((x * x * counts).sum()), float((np.abs(x) * counts).sum())
    std = math.sqrt(float((np.square(x - mean) * counts).sum()) / count)
    found = (
        x.min(), x.max(), np.abs(x).max(), mean, std, math.sqrt(squares / count), l1,
        math.sqrt(squares),
    )  # fmt: skip
    return dict(zip(names, map(float, found), strict=True))
