"""Comparing two tensors by compiled code; the other side of `compare.c`, `select.c`, and so on.

Differences are `other - ref` in float64. Histograms count them by their leading bits, from which
order statistics are refined with `select`. Of tensors of codes only pairs of codes are counted.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap.native.codes import code_table
from tensortap.native.counts import (
    ROW,
    ROWS,
    TARGETS,
    CodePairs,
    Histogram,
    Histograms,
    Ints,
    Quest,
    blank,
)
from tensortap.native.totals import Frame, Totals

NO_PREFIX = (1 << 63) - 1
"""One that no value has."""

_SHARED = 1 << 16
"""Pairs from which on it is worth waking torch's threads."""
_BYTE, _NIBBLE = 10, 11
_WORDS = {
    torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int16: 4,
    torch.int32: 5, torch.int64: 6, torch.uint16: 7, torch.uint32: 8, torch.uint64: 9,
}  # fmt: skip


class _Side(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        ("is_float", ctypes.c_int64),
        ("table", ctypes.c_void_p),
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


class _Scratch(threading.local):
    """Where the kernel's threads count keys: zeros, before and after each call."""

    room: Ints = np.empty(0, dtype=np.int64)

    def of(self, threads: int) -> int:
        """The address of enough for `threads`; made once a Python thread."""
        needed = 4 * ROWS * ROW * threads  # two histograms a thread, of 32-bit counts
        if len(self.room) < needed:
            self.room = blank(needed)
        return _address(self.room)


class Comparing:
    """The functions of a loaded library; tensors are contiguous, real and on the CPU."""

    def __init__(self, path: Path) -> None:
        free = ctypes.CDLL(str(path))
        self._compare, self._select = free.tensortap_compare, free.tensortap_compare_select
        self._codes, self._change = free.tensortap_compare_codes, free.tensortap_compare_change
        self._compare.argtypes = _kinds("pppiippppi")
        self._select.argtypes = _kinds("pppippi")
        self._codes.argtypes = _kinds("ppiippi")
        self._change.argtypes = _kinds("ppip")
        self._compare.restype = ctypes.c_int64
        self._select.restype = self._codes.restype = self._change.restype = None
        self._scratch = _Scratch()

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
        """Add a block of pairs, which follow those `totals` has counted; not codes on both sides.

        The first that can be compared set the origins of `frame`.
        """
        one, two, count = self._side(ref), self._side(other), _values(ref)
        fine = histograms.absolute.keys is not None
        threads = threads if fine and count >= _SHARED else 1
        counts = [_histogram(x) for x in (histograms.absolute, histograms.relative)]
        failed = self._compare(
            ctypes.byref(one), ctypes.byref(two), ctypes.byref(frame), count, totals.count,
            ctypes.byref(totals), *(ctypes.byref(histogram) for histogram in counts),
            self._scratch.of(threads) if fine else None, threads,
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

    def count(
        self, ref: torch.Tensor, other: torch.Tensor, pairs: CodePairs, *, threads: int
    ) -> None:
        """Count a block of codes, which follows those that `pairs` has counted.

        `threads` must not be more than `pairs` is made for.
        """
        one, two, count = self._side(ref), self._side(other), _values(ref)
        self._codes(
            ctypes.byref(one), ctypes.byref(two), count, pairs.total, _address(pairs.times),
            _address(pairs.places), threads if count >= _SHARED else 1,
        )  # fmt: skip
        pairs.total += count

    def change(self, ref: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
        """The largest and the summed |other - ref|; NaN once one of them is."""
        found = (ctypes.c_double * 2)()
        one, two = self._side(ref), self._side(other)
        self._change(ctypes.byref(one), ctypes.byref(two), _values(ref), found)
        return found[0], found[1]

    def _side(self, tensor: torch.Tensor) -> _Side:
        dtype = tensor.dtype
        if dtype in _WORDS:
            return _Side(tensor.data_ptr(), _WORDS[dtype], dtype.is_floating_point, None)
        table = code_table(dtype)
        assert table is not None
        kind = _NIBBLE if _packed(dtype) else _BYTE
        return _Side(tensor.data_ptr(), kind, False, _address(table.values))


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


def _histogram(seen: Histogram) -> _Histogram:
    keys = None if seen.keys is None else _address(seen.keys)
    return _Histogram(keys, _address(seen.rows))


def _quest(quest: Quest) -> _Quest:
    prefixes = [*quest.prefixes, *[NO_PREFIX] * (TARGETS - len(quest.prefixes))]
    known = quest.shift, (ctypes.c_int64 * TARGETS)(*prefixes)
    if quest.found is not None:
        return _Quest(*known, _address(quest.found), len(quest.found), quest.taken)
    tables = (_address(table) for table in (quest.counts, quest.ones, quest.zeros))
    return _Quest(*known, None, 0, 0, len(quest.prefixes), *tables)
