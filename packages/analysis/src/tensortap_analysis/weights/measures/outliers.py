"""Rows and columns of a matrix that are much longer than the others, or much shorter; values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tensortap_analysis.weights.measures.facts import Facts

Doubles = npt.NDArray[np.float64]

FAR = 6.0
"""Times the median length, beyond which a row or column stands out."""
FAINT = 1e-4
"""Times the median length, below which a row is as good as dead."""
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


def faint(facts: Facts) -> dict[str, Any]:
    """`faint_rows`: how many are not 0, and shorter than 1e-4 of the median row that is not 0.

    `faint_rows_at` lists the first few.
    """
    lengths = facts.rows.norms
    present = lengths[lengths > 0]
    short = FAINT * np.median(present) if len(present) else 0.0
    at = np.flatnonzero((lengths > 0) & (lengths < short))
    return {"faint_rows": len(at), "faint_rows_at": at[:_SHOWN].tolist()}


def largest(facts: Facts) -> dict[str, Any]:
    """`largest_at`: the largest magnitudes of the rows where they are largest, and their places.

    `[row, column, magnitude]`, the largest first; one of a row, zeros left out.
    """
    tops = facts.rows.rows["largest"]
    ranked = np.argsort(-tops, kind="stable")[:_SHOWN]
    return {"largest_at": [_top(facts, int(row)) for row in ranked if tops[row] > 0]}


def _top(facts: Facts, row: int) -> list[int | float]:
    values = facts.matrix[row].to(torch.float64, copy=True).nan_to_num_(0.0, 0.0, 0.0).abs_()
    column = int(values.argmax())
    return [row, column, float(values[column])]


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
