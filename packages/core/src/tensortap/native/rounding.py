"""Rounding to a number format and decoding by compiled code; the other side of `formats.c`."""

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
        ("sign", ctypes.c_int32),
        ("max", ctypes.c_float),
        ("tensor_scale", ctypes.c_float),
        ("tensor_inverse", ctypes.c_float),
    )


class Rounding:
    """The functions of a loaded library; all tensors are contiguous, inputs float32 or bfloat16."""

    def __init__(self, path: Path) -> None:
        free, held = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        self._blocks = _both(free, held, "tensortap_round_blocks", "ppppiiiipi")
        self._hifloat8 = _both(free, held, "tensortap_round_hifloat8", "pppiiii")
        self._decode = _both(free, held, "tensortap_decode", "ppppiiiii")

    def blocks(
        self, x: torch.Tensor, to: torch.Tensor, axis: int, grid: Grid, *, threads: int
    ) -> None:
        """Round the blocks of `x` along `axis` to values in `to`."""
        self._blocks[x.numel() > _HELD](
            x.data_ptr(), to.data_ptr(), None, None, x.element_size(), *_around(x, axis),
            ctypes.byref(grid), _worth(threads, x),
        )  # fmt: skip

    def block_codes(
        self,
        x: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
        axis: int,
        grid: Grid,
        *,
        threads: int,
    ) -> None:
        """Round the blocks of `x` along `axis` to codes and codes of scales, both uint8."""
        self._blocks[x.numel() > _HELD](
            x.data_ptr(), None, codes.data_ptr(), scales.data_ptr(), x.element_size(),
            *_around(x, axis), ctypes.byref(grid), _worth(threads, x),
        )  # fmt: skip

    def hifloat8(self, x: torch.Tensor, to: torch.Tensor, *, saturate: bool, threads: int) -> None:
        """Round `x` to HiFloat8, ties away from zero: to codes if `to` is uint8, else values."""
        at = (None, to.data_ptr()) if to.dtype is torch.uint8 else (to.data_ptr(), None)
        self._hifloat8[x.numel() > _HELD](
            x.data_ptr(), *at, x.element_size(), x.numel(), saturate, _worth(threads, x)
        )

    def decode(
        self,
        codes: torch.Tensor,
        table: torch.Tensor,
        scales: torch.Tensor | None,
        to: torch.Tensor,
        axis: int,
        block: int,
        *,
        threads: int,
    ) -> None:
        """The float32 values of uint8 codes by a table of 256, times the float32 scales."""
        self._decode[codes.numel() > _HELD](
            codes.data_ptr(), table.data_ptr(), None if scales is None else scales.data_ptr(),
            to.data_ptr(), *_around(codes, axis), block, _worth(threads, codes),
        )  # fmt: skip


def _both(free: ctypes.CDLL, held: ctypes.PyDLL, name: str, arguments: str) -> list[Any]:
    """The function that keeps the GIL, then the one that gives it up; p: pointer, i: int64."""
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    functions = [held[name], free[name]]
    for function in functions:
        function.restype, function.argtypes = None, [kinds[kind] for kind in arguments]
    return functions


def _around(x: torch.Tensor, axis: int) -> tuple[int, int, int]:
    """How many indices there are before, on and after the axis."""
    return x.shape[:axis].numel(), x.shape[axis], x.shape[axis + 1 :].numel()


def _worth(threads: int, x: torch.Tensor) -> int:
    return threads if x.numel() >= _SHARED else 1
