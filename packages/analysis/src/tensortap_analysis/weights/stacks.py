"""Metrics of a stack of experts, from those of its matrices: the worst of each, and which it is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

_LOWER_IS_WORSE = (
    "s_min", "stable_rank", "total_rank", "effective_rank", "energy_rank_90", "energy_rank_99",
    "sqnr_db", "sqnr_db_per_channel", "row_norm_min",
)  # fmt: skip
_ADDED = (
    "zeros", "near_zeros", "dead_rows", "dead_columns", "duplicated_rows", "nan", "inf", "l1",
)  # fmt: skip
"""Counts and sums: those of the stack are the sum over its matrices."""
_DROPPED = ("spectrum",)


def worst(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method's metrics of a stack.

    A metric is that of the worst matrix (a sum where it counts); `experts` has, for each that
    differs among them, the matrix it comes from, the smallest, the median and the largest. What
    is unresolved in any matrix is unresolved in the stack.
    """
    if not parts:
        return {"unresolved": {"*": "the stack has no matrix"}, "experts": {"count": 0}}
    spread: dict[str, Any] = {"count": len(parts)}
    found = _merged(parts, "", spread)
    reasons: dict[str, str] = {}
    for index, part in enumerate(parts):
        for metric, reason in part.get("unresolved", {}).items():
            reasons.setdefault(metric, f"matrix {index}: {reason}")
    return {**found, "unresolved": reasons, "experts": spread}


def _merged(parts: Sequence[dict[str, Any]], path: str, spread: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric in dict.fromkeys(metric for part in parts for metric in part):
        if metric == "unresolved" or metric in _DROPPED:
            continue
        values = [part.get(metric) for part in parts]
        first = next((value for value in values if value is not None), None)
        name = f"{path}{metric}"
        if isinstance(first, dict):
            maps = [value for value in values if isinstance(value, dict)]
            found[metric] = _merged(maps, f"{name}.", spread)
        elif isinstance(first, (str, bool, list)):
            found[metric] = first
        else:
            lower = metric in _LOWER_IS_WORSE or path == "formats."
            found[metric] = _number(name, metric, values, lower, spread)
    return found


def _number(
    name: str, metric: str, values: Sequence[Any], lower: bool, spread: dict[str, Any]
) -> int | float | None:
    known = [(value, index) for index, value in enumerate(values) if value is not None]
    if not known:
        return None
    numbers = [value for value, _ in known]
    pick = min if lower else max
    value, index = pick(known, key=lambda one: (one[0], -one[1] if not lower else one[1]))
    if min(numbers) != max(numbers):
        spread[name] = {
            "worst": index,
            "min": min(numbers),
            "median": statistics.median_low(numbers),
            "max": max(numbers),
        }
    if metric == "l2":
        return float(sum(number * number for number in numbers) ** 0.5)
    chosen: int | float = sum(numbers) if metric in _ADDED else value
    return chosen
