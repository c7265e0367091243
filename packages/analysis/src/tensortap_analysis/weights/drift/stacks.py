"""The change of a stack of experts: for each metric that of the expert that is worst off."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_LOWEST = ("cosine", "effective_rank_ratio")
_FARTHEST = "spectral_norm_ratio"
"""A ratio: the one farthest from 1 either way."""
_NORMS = ("l2_before", "l2_after")
_ADDED = ("not_finite_before", "not_finite_after")


def worst_change(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`expert` is the one that changed most, relatively; `experts` how many there are.

    `unchanged` is the mean, counts are sums, and norms those of the whole stack. `norm_expert` is
    the one whose norm grew or fell farthest: the norm ratio and the sizes are its. Of which expert
    the row that moved most is, is not said.
    """
    found = {metric: _worst(metric, [part[metric] for part in parts]) for metric in parts[0]}
    farthest = max(range(len(parts)), key=lambda at: _way(parts[at]))
    most = [part["relative_change"] for part in parts]
    known = [at for at, value in enumerate(most) if value is not None]
    expert = max(known, key=lambda at: most[at]) if known else None
    one = {name: parts[farthest][name] for name in ("l2_norm_ratio", "size_before", "size_after")}
    one["norm_expert"] = farthest
    return found | one | {"row_change_at": None, "expert": expert, "experts": len(parts)}


def _way(part: dict[str, Any]) -> float:
    """How far its norm went, either way. From zeros that is infinitely far, however little it
    became, which must not hide others: its size counts.
    """
    if part["l2_norm_ratio"] is None:
        return -1.0
    if not part["l2_before"] and part["size_after"]:
        return math.log(max(part["size_after"], 1.0))
    return _away(part["l2_norm_ratio"])


def _worst(metric: str, values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    if not known:
        return None
    if metric == "unresolved":
        return {name: reason for value in known for name, reason in value.items()}
    if metric in _NORMS:
        return math.hypot(*known) if len(known) == len(values) else None
    if metric in _ADDED:
        return sum(known)
    if metric == "unchanged":
        return sum(known) / len(known)
    if metric == _FARTHEST:
        return max(known, key=_away)
    return min(known) if metric in _LOWEST else max(known)


def _away(ratio: float) -> float:
    return abs(math.log(ratio)) if ratio > 0 else math.inf
