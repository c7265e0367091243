"""Comparing two tensors by compiled code; the other side of `compare.c` and `select.c`.

Differences are `other - ref` in float64. Histograms count them by their leading bits (`key`),
from which order statistics are refined with `select`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap.native.codes import CodeTable, code_table

KEY_SHIFT, KEYS = 45, 1 << 18
"""A key is what remains of a float64 above this bit; there are so many without the sign."""
ROWS = 2048
"""Exponents of float64, each a row of keys."""
TARGETS, NEXT_BITS = 8, 12
"""Prefixes `select` looks for at once, and how many further bits it counts them by."""
NOTHING = (1 << 63) - 1
"""A prefix no value has."""

_SHARED = 1 << 16
"""Pairs from which on it is worth waking torch's threads."""
_BYTE, _NIBBLE = 10, 11
_WORDS = {
    torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int16: 4,
    torch.int32: 5, torch.int64: 6, torch.uint16: 7, torch.uint32: 8, torch.uint64: 9,
}  # fmt: skip
Ints = npt.NDArray[np.int64]


class Moments(ctypes.Structure):
    """Smallest and largest value, mean as seen from an origin, sum of squared deviations."""

    lo: float
    hi: float
    mean: float
    m2: float
    _fields_ = tuple((name, ctypes.c_double) for name in ("lo", "hi", "mean", "m2"))


class Totals(ctypes.Structure):
    """What is known of the pairs so far; counters first. `totals` in totals.h.

    `largest` is the largest difference in units of `Frame.half` (-1: none yet), `at` the place
    of its first occurrence.
    """

    count: int
    compared: int
    nan_ref: int
    nan_other: int
    inf_ref: int
    inf_other: int
    mismatches: int
    unequal: int
    zero: int
    at: int
    ulp_max: int
    ref: Moments
    other: Moments
    difference: Moments
    abs_ref: float
    abs_difference: float
    comoment: float
    largest: float
    relative_max: float
    relative_sum: float
    ulp_sum: float
    COUNTERS = (
        "count", "compared", "nan_ref", "nan_other", "inf_ref", "inf_other", "mismatches",
        "unequal", "zero",
    )  # fmt: skip
    SUMS = ("abs_ref", "abs_difference", "comoment", "relative_sum", "ulp_sum")
    _fields_ = (
        *((name, ctypes.c_int64) for name in (*COUNTERS, "at")),
        ("ulp_max", ctypes.c_uint64),
        *((name, Moments) for name in ("ref", "other", "difference")),
        *((name, ctypes.c_double) for name in ("abs_ref", "abs_difference", "comoment")),
        *((name, ctypes.c_double) for name in ("largest", "relative_max")),
        *((name, ctypes.c_double) for name in ("relative_sum", "ulp_sum")),
    )

    @classmethod
    def none(cls) -> Totals:
        """Of no pairs."""
        empty = [Moments(np.inf, -np.inf, 0.0, 0.0) for _ in range(3)]
        return cls(at=-1, largest=-1.0, ref=empty[0], other=empty[1], difference=empty[2])


class Frame(ctypes.Structure):
    """Units of the sums, powers of two, and origins of the means; `frame` in pairs.h.

    The difference is `(other * half - ref * half) * difference`: `half` is 1, or 0.5 where the
    plain difference would overflow.
    """

    ref: float
    other: float
    half: float
    difference: float
    ref_origin: float
    other_origin: float
    difference_origin: float
    _fields_ = tuple(
        (name, ctypes.c_double)
        for name in (
            "ref", "other", "half", "difference", "ref_origin", "other_origin",
            "difference_origin",
        )
    )  # fmt: skip


class _Side(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("is_float", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
    )


class _Histogram(ctypes.Structure):
    _fields_ = (("keys", ctypes.c_void_p), ("rows", ctypes.c_void_p))


class _Quest(ctypes.Structure):
    _fields_ = (
        ("shift", ctypes.c_int64),
        ("prefix", ctypes.c_int64 * TARGETS),
        *((name, ctypes.c_void_p) for name in ("found",)),
        *((name, ctypes.c_int64) for name in ("room", "taken", "rows")),
        *((name, ctypes.c_void_p) for name in ("counts", "ones", "zeros")),
    )


def blank(count: int) -> Ints:
    """Zeros that take no memory before they are written to."""
    return np.frombuffer(mmap.mmap(-1, count * 8), dtype=np.int64)


class Histogram:
    """How often each key occurs (`keys`), and each sign and exponent (`rows`); positive first."""

    def __init__(self) -> None:
        self.keys = blank(2 * KEYS).reshape(2, ROWS, KEYS // ROWS)
        self.rows = np.zeros((2, ROWS), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Histograms:
    """Of differences, and of relative ones."""

    absolute: Histogram = field(default_factory=Histogram)
    relative: Histogram = field(default_factory=Histogram)


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
    counts: Ints = field(init=False)
    ones: Ints = field(init=False)
    zeros: Ints = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.threads, len(self.prefixes) if self.found is None else 0, 1 << NEXT_BITS)
        self.counts, self.ones, self.zeros = (np.zeros(shape, dtype=np.int64) for _ in range(3))


class Comparing:
    """The functions of a loaded library; tensors are contiguous, real and on the CPU."""

    def __init__(self, path: Path) -> None:
        free = ctypes.CDLL(str(path))
        self._compare, self._select = free.tensortap_compare, free.tensortap_compare_select
        self._first = free.tensortap_compare_first
        self._compare.argtypes = _kinds("pppiippppi")
        self._select.argtypes = _kinds("pppippi")
        self._first.argtypes = _kinds("ppip")
        self._compare.restype = self._first.restype = ctypes.c_int64
        self._select.restype = None
        self._tables: dict[torch.dtype, CodeTable | None] = {}

    def first(self, ref: torch.Tensor, other: torch.Tensor) -> tuple[float, float] | None:
        """The first pair that is finite on both sides."""
        pair = (ctypes.c_double * 2)()
        one, two = self._side(ref), self._side(other)
        there = self._first(ctypes.byref(one), ctypes.byref(two), _values(ref), pair)
        return (pair[0], pair[1]) if there else None

    def add(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        totals: Totals,
        histograms: Histograms,
        *,
        threads: int,
    ) -> None:
        """Add a block of pairs, which follow those `totals` has counted."""
        one, two, count = self._side(ref), self._side(other), _values(ref)
        threads = threads if count >= _SHARED else 1
        scratch = blank(2 * KEYS * threads)
        counts = [_Histogram(_address(x.keys), _address(x.rows))
                  for x in (histograms.absolute, histograms.relative)]  # fmt: skip
        failed = self._compare(
            ctypes.byref(one), ctypes.byref(two), ctypes.byref(frame), count, totals.count,
            ctypes.byref(totals), *(ctypes.byref(histogram) for histogram in counts),
            _address(scratch), threads,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory to compare {count} pairs")

    def select(
        self,
        ref: torch.Tensor,
        other: torch.Tensor,
        frame: Frame,
        absolute: Quest | None,
        relative: Quest | None,
        *,
        threads: int,
    ) -> None:
        """Look for the values of the quests in a block: |differences|, and relative ones.

        `threads` must not be more than the quests are made for.
        """
        one, two, count = self._side(ref), self._side(other), _values(ref)
        quests = (absolute, relative)
        sought = [None if quest is None else _quest(quest) for quest in quests]
        self._select(
            ctypes.byref(one), ctypes.byref(two), ctypes.byref(frame), count,
            *(None if quest is None else ctypes.byref(quest) for quest in sought),
            threads if count >= _SHARED else 1,
        )  # fmt: skip
        for quest, done in zip(quests, sought, strict=True):
            if quest is not None and done is not None:
                quest.taken = done.taken

    def _side(self, tensor: torch.Tensor) -> _Side:
        dtype = tensor.dtype
        if dtype in _WORDS:
            return _Side(tensor.data_ptr(), _WORDS[dtype], dtype.is_floating_point, None, None)
        if dtype not in self._tables:
            self._tables[dtype] = code_table(dtype)
        table = self._tables[dtype]
        assert table is not None
        order = None if table.order is None else _address(table.order)
        kind = _NIBBLE if _packed(dtype) else _BYTE
        return _Side(tensor.data_ptr(), kind, order is not None, _address(table.values), order)


def _address(array: npt.NDArray[Any]) -> int:
    """What `array.ctypes.data` says, ten times as fast."""
    address: int = array.__array_interface__["data"][0]
    return address


def _packed(dtype: torch.dtype) -> bool:
    return dtype is getattr(torch, "float4_e2m1fn_x2", ())


def _values(tensor: torch.Tensor) -> int:
    return tensor.numel() * (2 if _packed(tensor.dtype) else 1)


def _kinds(arguments: str) -> list[Any]:
    """p: pointer, i: int64."""
    kinds: Mapping[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    return [kinds[kind] for kind in arguments]


def _quest(quest: Quest) -> _Quest:
    prefixes = [*quest.prefixes, *[NOTHING] * (TARGETS - len(quest.prefixes))]
    found, room = (None, 0) if quest.found is None else (_address(quest.found), len(quest.found))
    return _Quest(
        quest.shift, (ctypes.c_int64 * TARGETS)(*prefixes), found, room, quest.taken,
        len(quest.prefixes),
        *(_address(array) for array in (quest.counts, quest.ones, quest.zeros)),
    )  # fmt: skip
