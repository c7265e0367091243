"""The distinct values of a matrix and how often each occurs, for dtypes of 8 and 16 bits.

Every metric that looks at values one by one follows from them exactly, in one fast pass.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from tensortap import native
from tensortap_analysis.weights.measures.values import Values

_PIECE = 1 << 20


def distinct(matrix: torch.Tensor) -> Values | None:
    """The finite values that occur, ascending by code; `None` for dtypes of 32 bits and more."""
    if matrix.dtype.itemsize > 2:
        return None
    counts = _counts(matrix)
    codes = np.flatnonzero(counts)
    word, size = (np.uint16, torch.int16) if matrix.dtype.itemsize == 2 else (np.uint8, torch.uint8)
    # Through a signed view: torch has had uint16 for a short time only.
    stored = torch.from_numpy(codes.astype(word).view(np.int16 if word is np.uint16 else word))
    assert stored.dtype is size
    x = stored.view(matrix.dtype).to(torch.float32)
    finite = x.isfinite()
    found = torch.from_numpy(counts[codes]).to(torch.float64)
    return Values(x[finite], found[finite])


def _counts(matrix: torch.Tensor) -> npt.NDArray[np.int64]:
    """How often each code occurs, by code."""
    flat = matrix.reshape(-1)
    if matrix.dtype.itemsize == 2:
        kernel = native.library()
        if kernel is not None:
            return kernel.surveying.codes(flat)
        words = flat.view(torch.int16).numpy().view(np.uint16)
    else:
        words = flat.view(torch.uint8).numpy()
    size = 1 << 8 * matrix.dtype.itemsize
    counts = np.zeros(size, np.int64)
    for start in range(0, len(words), _PIECE):
        counts += np.bincount(words[start : start + _PIECE], minlength=size)
    return counts
