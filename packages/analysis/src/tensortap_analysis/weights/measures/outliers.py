"""Rows and columns of a matrix that are much longer than the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap_analysis.weights.measures.facts import Facts

Doubles = npt.NDArray[np.float64]

FAR = 6.0
"""Times the median length, beyond which a row or column stands out."""
_SHOWN, _SAMPLE, _TOGETHER = 8, 64, 8
"""How many are listed; how many rows are looked at to find columns, and how many of them at once:
what stays in the cache."""


def outliers(facts: Facts) -> dict[str, Any]:
    """`outlier_rows`, `outlier_columns`: how many have a norm beyond 6 times the median one.

    One large value does not make its row an outlier: no value may have half of the energy. Columns
    are looked at in 64 rows, evenly apart. `outlier_rows_at` lists the longest few as
    `[index, times the median]`.
    """
    survey = facts.rows.rows
    rows = _far(survey["squares"], np.square(survey["largest"] * facts.unit))
    columns = _far(*_columns(facts))
    return {
        "outlier_rows": len(rows),
        "outlier_columns": len(columns),
        "outlier_rows_at": rows[:_SHOWN],
        "outlier_columns_at": columns[:_SHOWN],
    }


def _columns(facts: Facts) -> tuple[Doubles, Doubles]:
    """Of the finite values of some rows: sums of squares by column, and the largest squares."""
    height, width = facts.matrix.shape
    if not height or not width:
        return np.zeros(0), np.zeros(0)
    total, largest = torch.zeros(2, width, dtype=torch.float64)
    for piece in torch.split(facts.matrix[:: -(-height // _SAMPLE)], _TOGETHER):
        wide = piece.to(torch.float64, copy=True)
        if facts.not_finite is not None:
            wide.nan_to_num_(0.0, 0.0, 0.0)
        squares = wide.mul_(facts.unit).square_()
        total += squares.sum(0)
        torch.maximum(largest, squares.amax(0), out=largest)
    return total.numpy(), largest.numpy()


def _far(squares: Doubles, largest: Doubles) -> list[list[int | float]]:
    """Which lengths are far above the median of those that are not 0, the longest first."""
    lengths = np.sqrt(squares)
    present = lengths[lengths > 0]
    if not len(present):
        return []
    times = lengths / np.median(present)
    far = np.flatnonzero((times > FAR) & (largest <= squares / 2))
    ranked = far[np.argsort(-times[far], kind="stable")]
    return [[int(index), float(times[index])] for index in ranked]
