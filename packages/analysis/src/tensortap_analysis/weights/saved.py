"""What a saved scan may hold: metrics of the types that measures give, and nothing else.

A report is judged, drawn and advised from without the weights; a file that was damaged, or written
by somebody else, is refused as a whole rather than judged in part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Metrics = dict[str, Any]
_NONFINITE = {"inf": math.inf, "-inf": -math.inf}
_LARGEST = 2**63
_COUNTS = ("nan", "inf", "rows", "columns", "zeros", "near_zeros", "dead_experts", "full_rank",
           "dead_rows", "dead_columns", "duplicated_rows", "faint_rows", "outlier_rows",
           "outlier_columns", "total_rank", "energy_rank_90", "energy_rank_99")  # fmt: skip
_SPREAD = {"worst", "min", "median", "max"}


def stats_of(rows: Mapping[str, Any], methods: Iterable[str]) -> dict[str, dict[str, Metrics]]:
    """By layer; raises `ValueError` where one lacks a method, or a metric is none."""
    found = {}
    for layer, row in rows.items():
        if lost := set(methods) - set(row):
            raise ValueError(f"{layer} lacks {', '.join(sorted(lost))}")
        stats = {method: metrics for method, metrics in row.items() if method != "weight"}
        found[layer] = checked(stats, layer)
    return found


def checked(stats: Mapping[str, Any], layer: str) -> dict[str, Metrics]:
    """Metrics by method, decoded; raises `ValueError`."""
    for method, metrics in stats.items():
        if not isinstance(metrics, dict) or not _all(metrics.get("unresolved"), _is_text):
            raise ValueError(f"{layer} {method} has no metrics")
        for metric, value in metrics.items():
            if not _is_metric(metric, value):
                raise ValueError(f"{layer} {method} {metric}: {str(value)[:40]!r} is no number")
    return {method: decoded(metrics) for method, metrics in stats.items()}


def _is_metric(metric: str, value: Any) -> bool:
    if metric == "unresolved":
        return True
    if metric == "rank_errors" and value is not None:
        return _all(value, _is_number) and all(len(r) < 19 and r.isdecimal() for r in value)
    if metric == "formats" and value is not None:
        return _all(value, lambda one: one is None or _is_number(one))
    if metric == "experts":
        return isinstance(value, dict) and all(_is_spread(*one) for one in value.items())
    if metric.endswith("_at"):
        return isinstance(value, list) and all(map(_is_place, value))
    if metric == "spectrum" and isinstance(value, list):
        return all(map(_is_number, value))
    return value is None or (_is_count(value) if metric in _COUNTS else _is_number(value))


def _is_spread(metric: str, value: Any) -> bool:
    if metric == "count":
        return _is_count(value)
    return _all(value, _is_number) and set(value) == _SPREAD


def _is_place(value: Any) -> bool:
    if isinstance(value, list):
        return 1 < len(value) < 5 and all(map(_is_number, value))
    return _is_count(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return value in _NONFINITE
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _all(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(good, value.values()))


def texts(values: Iterable[Any], what: str) -> tuple[str, ...]:
    """Raises `ValueError` for anything but a list of texts."""
    if not isinstance(values, list) or not all(map(_is_text, values)):
        raise ValueError(f"{what} is no list of texts")
    return tuple(values)


def encoded(value: Any) -> Any:
    """`value` with infinities as strings: what JSON can hold. NaN is an error here."""
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("a metric is NaN; one that is not known must be None")
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, dict):
        return {key: encoded(one) for key, one in value.items()}
    return [encoded(one) for one in value] if isinstance(value, (list, tuple)) else value


def decoded(value: Any) -> Any:
    """Inverse of `encoded`."""
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decoded(one) for key, one in value.items()}
    return [decoded(one) for one in value] if isinstance(value, list) else value
