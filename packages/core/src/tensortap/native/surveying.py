"""What a scan asks of a matrix of weights, by compiled code; the other side of `survey.c`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

CODE_TABLES = (4, 1 << 16)
"""The shape of the tables that codes are counted in: a counter is never raised twice in a row."""
ROW = np.dtype([
    ("squares", np.float64), ("noise", np.float64), ("hash", np.float64),
    ("largest", np.float64), ("odd", np.int64),
])  # fmt: skip
"""`row_facts` in survey.c: what is known of the finite values of one row."""

_KINDS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


class _Elements(ctypes.Structure):
    fourth: float
    outliers: int
    near_zero: int
    _fields_ = (
        ("fourth", ctypes.c_double),
        ("outliers", ctypes.c_int64),
        ("near_zero", ctypes.c_int64),
    )


class Surveying:
    """The functions of a loaded library; matrices are contiguous and on the CPU."""

    def __init__(self, path: Path) -> None:
        free = ctypes.CDLL(str(path))
        self._survey, self._count = free.tensortap_survey, free.tensortap_count_codes
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._survey.argtypes = [
            pointer, number, number, number, ctypes.c_double, pointer, pointer, pointer,
        ]  # fmt: skip
        self._survey.restype = number
        self._count.argtypes, self._count.restype = [pointer, number, pointer], None
        self._elements = free.tensortap_elements
        self._elements.argtypes = [pointer, number, number, *[ctypes.c_double] * 4, pointer]
        self._elements.restype = None

    def rows(
        self,
        matrix: torch.Tensor,
        unit: float,
        keys: npt.NDArray[np.float64],
        live: npt.NDArray[Any],
        out: npt.NDArray[np.void],
    ) -> None:
        """Facts of each row of a float32, float64, float16 or bfloat16 matrix, into `out` (`ROW`).

        `keys` are random numbers, one a column, for the rows' hashes: rows whose values are equal
        have equal ones. `live` are zeros, int32 or for float64 int64; columns that hold anything
        but zeros come back as something else. Sums are of values times `unit` (1 unless float64),
        errors those of int8 with one scale a row.
        """
        failed = self._survey(
            matrix.data_ptr(), _KINDS[matrix.dtype], *matrix.shape, unit, keys.ctypes.data,
            live.ctypes.data, out.ctypes.data,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for a row of {matrix.shape[1]} values")

    def elements(
        self, values: torch.Tensor, mean: float, std: float, outlier: float, near_zero: float
    ) -> tuple[float, int, int]:
        """Of contiguous float32 or float64 values: the sum of fourth powers of those standardised,
        how many are farther from `mean` than `outlier`, and how many at most `near_zero`.
        """
        found = _Elements()
        self._elements(
            values.data_ptr(), _KINDS[values.dtype], values.numel(), mean, 1 / std, outlier,
            near_zero, ctypes.byref(found),
        )  # fmt: skip
        return found.fourth, found.outliers, found.near_zero

    def codes(self, values: torch.Tensor, tables: npt.NDArray[np.uint32]) -> None:
        """Add how often each 16-bit code occurs to `CODE_TABLES`, whose sum is meant.

        At most 2^31 values fit between two resets.
        """
        self._count(values.data_ptr(), values.numel(), tables.ctypes.data)
