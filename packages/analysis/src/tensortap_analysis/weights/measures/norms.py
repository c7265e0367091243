"""Norms of a matrix and of its rows; what is not finite is counted and left out of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tensortap_analysis.weights.measures.facts import ALL_ZERO, Facts, nothing, overflown
from tensortap_analysis.weights.measures.outliers import faint, largest, outliers
from tensortap_analysis.weights.options import Options

_METRICS = (
    "l1", "l2", "max", "mean", "std", "row_norm_min", "row_norm_max", "row_norm_mean",
    "row_norm_median", "row_norm_spread",
)  # fmt: skip


def norms(facts: Facts, options: Options) -> dict[str, Any]:
    """`l1`, `l2` (Frobenius) and `max` (of |w|), `mean` and `std` (population), and of rows.

    `row_norm_spread` is the standard deviation of the rows' l2 norms over their mean. `outliers`,
    `faint` and `largest` say what stands out. All are over the finite values; `nan` and `inf`
    count the others.
    """
    found = facts.statistics
    counts = {**outliers(facts), **faint(facts), **largest(facts)}
    counts |= {"nan": found.nan, "inf": found.posinf + found.neginf}
    if found.absmax is None:
        return nothing(_METRICS, facts.unusable or "no finite value") | counts
    whole = {
        "l1": found.l1, "l2": found.l2, "max": found.absmax, "mean": found.mean, "std": found.std,
    }  # fmt: skip
    of_rows, unresolved = _of_rows(facts)
    lengths = whole | of_rows
    return lengths | counts | {"unresolved": overflown(lengths) | unresolved}


def _of_rows(facts: Facts) -> tuple[dict[str, Any], dict[str, str]]:
    """Metrics of the rows' norms, and what of them is unresolved."""
    lengths = facts.rows.norms
    mean = float(lengths.mean())
    found = {
        "row_norm_min": float(lengths.min()) / facts.unit,
        "row_norm_max": float(lengths.max()) / facts.unit,
        "row_norm_mean": mean / facts.unit,
        "row_norm_median": float(np.median(lengths)) / facts.unit,
        "row_norm_spread": float(lengths.std()) / mean if mean else None,
    }
    return found, {} if mean else {"row_norm_spread": ALL_ZERO}
