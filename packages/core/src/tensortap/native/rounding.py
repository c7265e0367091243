"""Rounding to a number format by compiled code; the other side of `formats.c`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

_HELD = 1 << 14
"""Elements. Up to here a call takes a few microseconds, less than giving up the GIL can cost."""
_SHARED = 1 << 17
"""Elements from which on it is worth waking torch's threads."""


class Grid(ctypes.Structure):
    """The grid of a block's elements and the source of its scale; `grid` in formats.c."""

    _fields_ = (
        ("block", ctypes.c_int32),
        ("power_of_two", ctypes.c_int32),
        ("emin", ctypes.c_int32),
        ("mantissa", ctypes.c_int32),
        ("emax", ctypes.c_int32),
        ("max", ctypes.c_float),
        ("tensor_scale", ctypes.c_float),
        ("tensor_inverse", ctypes.c_float),
    )


class Rounding:
    """The rounding functions of a loaded library; tensors are dense float32 or bfloat16."""

    def __init__(self, path: Path) -> None:
        free, held = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        self._blocks = _both(free, held, "tensortap_round_blocks", _BLOCKS)
        self._hifloat8 = _both(free, held, "tensortap_round_hifloat8", _HIFLOAT8)

    def blocks(
        self, x: torch.Tensor, to: torch.Tensor, axis: int, grid: Grid, *, threads: int
    ) -> None:
        """Round the blocks of contiguous `x` along `axis` into contiguous `to`."""
        shape = x.shape
        outer, inner = shape[:axis].numel(), shape[axis + 1 :].numel()
        call = self._blocks[x.numel() > _HELD]
        call(
            x.data_ptr(), to.data_ptr(), x.element_size(), outer, shape[axis], inner,
            ctypes.byref(grid), _worth(threads, x),
        )  # fmt: skip

    def hifloat8(self, x: torch.Tensor, to: torch.Tensor, *, saturate: bool, threads: int) -> None:
        """Round contiguous `x` to HiFloat8, ties away from zero, into contiguous `to`."""
        call = self._hifloat8[x.numel() > _HELD]
        call(x.data_ptr(), to.data_ptr(), x.element_size(), x.numel(), saturate, _worth(threads, x))


_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_BLOCKS: list[Any] = [_POINTER, _POINTER, _INT, _INT, _INT, _INT, _POINTER, _INT]
_HIFLOAT8: list[Any] = [_POINTER, _POINTER, _INT, _INT, _INT, _INT]


def _both(free: ctypes.CDLL, held: ctypes.PyDLL, name: str, arguments: list[Any]) -> list[Any]:
    """The function that keeps the GIL, then the one that gives it up meanwhile."""
    functions = [held[name], free[name]]
    for function in functions:
        function.restype, function.argtypes = None, arguments
    return functions


def _worth(threads: int, x: torch.Tensor) -> int:
    return threads if x.numel() >= _SHARED else 1
