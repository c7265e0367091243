"""Metrics of a stack of experts, from those of its matrices: the worst of each, and which it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tensortap_analysis.weights.measures.facts import ALL_ZERO

_LOWER_IS_WORSE = (
    "s_min", "stable_rank", "total_rank", "effective_rank", "energy_rank_90", "energy_rank_99",
    "sqnr_db", "sqnr_db_per_channel", "row_norm_min",
)  # fmt: skip
_ADDED = (
    "zeros", "near_zeros", "dead_rows", "dead_columns", "duplicated_rows", "nan", "inf", "l1",
    "outlier_rows", "outlier_columns", "faint_rows",
)  # fmt: skip
"""Counts and sums: those of the stack are the sum over its matrices."""
_SHARES = {"zero_fraction": "zeros", "near_zero_fraction": "near_zeros"}
_PLACES = (
    "dead_rows_at", "dead_columns_at", "duplicated_rows_at", "outlier_rows_at",
    "outlier_columns_at", "faint_rows_at", "largest_at",
)  # fmt: skip
_SHOWN = 8
"""So many places are listed, as of a single matrix."""


def worst(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One method's metrics of a stack.

    A metric is that of the worst matrix whose value is resolved, or of the worst where none is (a
    sum where it counts); `experts` has, for each that differs among them, the matrix it comes
    from, the smallest, the median and the largest. A metric is unresolved where that matrix leaves
    it so, and where any matrix has no value for it. Places (`dead_rows_at`) begin with the matrix,
    shares are of all values. Matrices of zeros have only counts and norms: they are not the worst
    of anything, and `dead_experts` counts them.
    """
    if not parts:
        return {"unresolved": {"*": "the stack has no matrix"}, "experts": {"count": 0}}
    spread: dict[str, Any] = {"count": len(parts)}
    alive = [{} if _directionless(part) else part for part in parts]
    used = alive if any(alive) else parts
    found = _merged(used, "", spread)
    unresolved = _unresolved(used, spread)
    found |= _places(parts)
    if "zeros" in found:
        found |= _counted(parts, found)
    if "spectrum" in found:
        unresolved["spectrum"] = "not kept of a stack, where each matrix has one"
    return {**found, "unresolved": unresolved, "experts": spread}


def _places(parts: Sequence[dict[str, Any]]) -> dict[str, list[list[Any]]]:
    """Where something is, the matrix first; what stands out by how far it does."""
    found = {}
    for name in (name for name in _PLACES if name in parts[0]):
        places = [
            [matrix, *(at if isinstance(at, list) else [at])]
            for matrix, part in enumerate(parts)
            for at in part[name]
        ]
        if name.startswith(("outlier", "largest")):
            places.sort(key=lambda place: -place[-1])
        found[name] = places[:_SHOWN]
    return found


def _counted(parts: Sequence[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """What follows from the counts of all matrices."""
    size = sum(part["rows"] * part["columns"] for part in parts)
    shares = {name: found[of] / size if size else None for name, of in _SHARES.items()}
    return {**shares, "dead_experts": sum(_zero(part) for part in parts)}


def _directionless(part: dict[str, Any]) -> bool:
    """Is it the spectrum or the quantisation of zeros, which have neither?"""
    return ALL_ZERO in part.get("unresolved", {}).values()


def _zero(part: dict[str, Any]) -> bool:
    """Are these the counts of a matrix of zeros?"""
    return bool(part["zeros"] and part["zeros"] == part["rows"] * part["columns"])


def _unresolved(parts: Sequence[dict[str, Any]], spread: dict[str, Any]) -> dict[str, str]:
    """By metric: of a matrix that has no value, else of the one that the value comes from."""
    given = [part.get("unresolved", {}) for part in parts]
    reasons: dict[str, str] = {}
    for metric in dict.fromkeys(metric for some in given for metric in some):
        unsure = [index for index, some in enumerate(given) if metric in some]
        lost = [index for index in unsure if parts[index].get(metric) is None]
        known = [index for index, part in enumerate(parts) if part.get(metric) is not None]
        if lost or metric in _ADDED or set(known) <= set(unsure):
            source = spread.get(metric, {}).get("worst", unsure[0])
            index = lost[0] if lost else source if source in unsure else unsure[0]
            reasons[metric] = f"matrix {index}: {given[index][metric]}"
    return reasons


def _merged(parts: Sequence[dict[str, Any]], path: str, spread: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for metric in dict.fromkeys(metric for part in parts for metric in part):
        if metric == "unresolved" or metric in _PLACES:
            continue
        if metric == "spectrum":
            found[metric] = None
            continue
        values = _resolved([part.get(metric) for part in parts], parts, metric)
        first = next((value for value in values if value is not None), None)
        name = f"{path}{metric}"
        if isinstance(first, dict):
            maps = [value if isinstance(value, dict) else {} for value in values]
            found[metric] = _merged(maps, f"{name}.", spread)
        elif isinstance(first, (str, bool, list)):
            found[metric] = first
        else:
            lower = metric in _LOWER_IS_WORSE or path == "formats."
            found[metric] = _number(name, metric, values, lower, spread)
    return found


def _resolved(values: list[Any], parts: Sequence[dict[str, Any]], metric: str) -> list[Any]:
    """Without the values that their matrix leaves unresolved, if any other matrix does not."""
    sure = [
        None if metric in part.get("unresolved", {}) else value
        for value, part in zip(values, parts, strict=True)
    ]
    return sure if any(value is not None for value in sure) else values


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
        return math.hypot(*numbers)
    chosen: int | float = sum(numbers) if metric in _ADDED else value
    return chosen
