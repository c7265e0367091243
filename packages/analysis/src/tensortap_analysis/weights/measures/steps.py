"""The rounding errors of values that were codes times scales: how large their spectral norm is.

What is given are the values; the codes' dtype says how many there are on one side of zero, and the
largest value that shares a scale is taken to be the last of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tensortap_analysis.weights.measures.blas import Doubles
from tensortap_analysis.weights.measures.facts import Facts
from tensortap_analysis.weights.measures.pieces import cut

_GROUP, _BLOCK = 128, 32
"""Values in a row that share a scale: of packed integers, and of 4-bit floats, at most usually."""
_INT8, _INT4, _E2M1 = 127.0, 7.0, 6.0
"""The last code; the steps of E2M1 differ, and are 1 in the root mean square."""
_SAMPLE, _WINDOW = 64, 32


def of_steps(facts: Facts) -> float:
    """The largest norm of the errors' rows plus that of their columns, in units of `facts.unit`.

    Integers that are no codes (the matrix itself holds them) are exact.
    """
    if not facts.matrix.is_floating_point():
        return 0.0
    last, group = _codes(facts)
    of_rows, of_columns = 0.0, np.zeros(-(-facts.matrix.shape[1] // group))
    for piece in cut(facts.matrix):
        squares = _steps(piece, last, group)
        of_rows = max(of_rows, float(squares.sum(1).max()) * group)
        of_columns += squares.sum(0)
    return (math.sqrt(of_rows) + math.sqrt(float(of_columns.max()))) * facts.unit / math.sqrt(12)


def _codes(facts: Facts) -> tuple[float, int]:
    """The last code, and how many values in a row share a scale."""
    width = facts.matrix.shape[1]
    if facts.dtype is torch.uint8:
        return _E2M1, min(_BLOCK, width)
    if facts.dtype is torch.int8 or _many(facts.matrix):
        return _INT8, width
    return _INT4, min(_GROUP, width)


def _many(matrix: torch.Tensor) -> bool:
    """Whether packed integers have more than 4 bits: of 32 neighbours most then differ."""
    windows = matrix[:_SAMPLE, :_WINDOW]
    counts = [len(torch.unique(row)) for row in windows]
    return float(np.median(counts)) > 16


def _steps(piece: torch.Tensor, last: float, group: int) -> Doubles:
    """The squared steps of each group of each row; a short last group counts as a whole one."""
    missing = -piece.shape[1] % group
    padded = torch.nn.functional.pad(piece.abs(), (0, missing))
    largest = padded.view(len(piece), -1, group).amax(2)
    squares: Doubles = (largest.to(torch.float64) / last).square().numpy()
    return squares
