"""Dtypes whose elements are codes of a byte or less: what each code is worth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CodeTable:
    """Values of the codes of a dtype of a byte or less; for floats, their order in ulp."""

    values: npt.NDArray[np.float64]
    order: Ints | None


@cache
def code_table(dtype: torch.dtype) -> CodeTable | None:
    """The table of a dtype whose values are codes; `None` for wider ones."""
    if dtype is getattr(torch, "float4_e2m1fn_x2", ()):
        half = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        values = np.concatenate([half, -half, np.full(240, np.nan)])
        return CodeTable(values, _order(sign=8))
    if dtype.itemsize > 1 or dtype.is_complex:
        return None
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    decoded = codes.ne(0) if dtype is torch.bool else codes.view(dtype)
    sign = 0 if dtype is getattr(torch, "float8_e8m0fnu", ()) else 128
    order = _order(sign) if dtype.is_floating_point else None
    return CodeTable(decoded.to(torch.float64).numpy(), order)


def _order(sign: int) -> Ints:
    codes = np.arange(256, dtype=np.int64)
    return np.where(codes & sign, -(codes & (sign - 1)), codes) if sign else codes
