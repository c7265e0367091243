"""What is odd about a drift: explosion, collapse, stall; with cause and remedy.

`classic` has the thresholds of the older guide. They look at the ratio of norms, which is 1 for two
unrelated matrices and for one that only turned; `default` looks at the change itself. In both, what
begins at nothing is judged by the size it reaches, and NaN is critical.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tensortap.errors import ConfigError
from tensortap_analysis.weights.drift.growth import (
    STOP,
    WATCH,
    beginning,
    begun_apart,
    is_matrix,
    norm_issues,
    whole_way,
)
from tensortap_analysis.weights.drift.tracking import Drift
from tensortap_analysis.weights.health import SEVERITIES, Issue, Severity
from tensortap_analysis.weights.health.default import typical_condition
from tensortap_analysis.weights.health.issue import limits_with

Row = Mapping[str, Any]
Limits = Mapping[str, float]

LIMITS: Mapping[str, Limits] = {
    "classic": {
        "explosion": 10.0, "ratio": 2.0, "condition_growth": 100.0, "stall": 0.01,
        "large": 3.0, "peers": 10.0,
    },
    "default": {
        "explosion": 10.0, "ratio": 2.0, "large": 3.0, "condition_growth": 100.0,
        "condition_ratio": 1000.0, "rank_ratio": 0.5, "cosine": 0.5, "row_change": 10.0,
        "peers": 10.0, "stall": 1e-6, "lost_updates": 0.99,
    },
}  # fmt: skip
ALL = "all weights"
"""The layer of an issue that is about most of them."""
_FEWEST = 4
"""Matrices, below which there is no saying what is usual."""


def alerts(drift: Drift, preset: str = "default", thresholds: Limits | None = None) -> list[Issue]:
    """Issues of all layers, the most severe first, then those farthest beyond their limit.

    `thresholds` replace limits of the preset. Raises `ConfigError` for one that it does not have.
    """
    limits = limits_of_preset(preset, thresholds or {})
    rules = _classic if preset == "classic" else _default
    found = [issue for layer, row in drift.layers.items() for issue in rules(layer, row, limits)]
    apart = [*begun_apart(drift.layers, limits)]
    if preset != "classic":
        told = {issue.layer for issue in found if issue.severity != "info"}
        changed = _among_peers(drift.layers, limits["peers"])
        apart += [issue for issue in changed if issue.layer not in told]
        found = _as_one(found, drift.layers)
    return ranked(_worst_of_each([*found, *apart]))


def _worst_of_each(found: Iterable[Issue]) -> list[Issue]:
    """One explosion by layer: it may be one by its size and one among its peers."""
    worst: dict[tuple[str, str], Issue] = {}
    for issue in ranked(found):
        what = issue.rule if issue.rule == "explosion" else issue.cause
        worst.setdefault((issue.layer, what), issue)
    return list(worst.values())


def overall_alerts(
    steps: Sequence[Drift], preset: str = "default", thresholds: Limits | None = None
) -> list[Issue]:
    """Norms that grew or vanished over all steps together, each of which may look harmless.

    Weights grow in training: only those are told that did so unlike most others, and are large.
    """
    limits = limits_of_preset(preset, thresholds or {})
    ways = {
        layer: way
        for layer in dict.fromkeys(layer for step in steps for layer in step.layers)
        if (way := whole_way([step.layers[layer] for step in steps if layer in step.layers]))
    }
    usual = _usual_ratio(ways.values())
    found = [
        issue for layer, way in ways.items() for issue in norm_issues(layer, way, limits)
        if issue.rule != "began" and _unlike(way["l2_norm_ratio"], usual, limits["ratio"])
    ]  # fmt: skip
    return ranked(found)


def _usual_ratio(ways: Iterable[Row]) -> float:
    """Of matrices, 1 where there are too few to say."""
    ratios = [way["l2_norm_ratio"] for way in ways if is_matrix(way)]
    return statistics.median(ratios) if len(ratios) >= _FEWEST else 1.0


def _unlike(ratio: float, usual: float, limit: float) -> bool:
    return not usual or not usual / limit <= ratio <= usual * limit


def together(issues: Iterable[Issue]) -> list[tuple[Issue, int]]:
    """Issues, and of how many others the same is to say; those to act on are each by itself."""
    groups: dict[tuple[str, ...], list[Issue]] = {}
    for issue in issues:
        alone = (issue.layer,) if issue.severity != "info" else ()
        groups.setdefault((issue.severity, issue.cause, issue.remedy, *alone), []).append(issue)
    return [(some[0], len(some) - 1) for some in groups.values()]


def ranked(found: Iterable[Issue]) -> list[Issue]:
    """The most severe first, then those farthest beyond their limit."""
    return sorted(found, key=lambda issue: (SEVERITIES.index(issue.severity), -issue.excess))


def _as_one(found: list[Issue], layers: Mapping[str, Row]) -> list[Issue]:
    """Where most matrices are other ones, that is one thing to say, and not of each."""
    others = [issue for issue in found if issue.rule == "replaced"]
    matrices = sum(is_matrix(row) for row in layers.values())
    if matrices < _FEWEST or len(others) <= matrices / 2:
        return found
    worst = max(others, key=lambda issue: issue.excess)
    cause = f"{len(others):,} of {matrices:,} matrices are other ones by now: cosines below "
    remedy = (
        "Are these checkpoints of one training, and not of another seed or model? From a first "
        "step to a last one it is usual."
    )
    one = replace(worst, layer=ALL, cause=f"{cause}{worst.limit:.3g}.", remedy=remedy)
    return [*(issue for issue in found if issue.rule != "replaced"), one]


def _among_peers(layers: Mapping[str, Row], limit: float) -> Iterator[Issue]:
    """Matrices that changed many times as much as most others in the same step."""
    changes = {
        layer: row["relative_change"]
        for layer, row in layers.items()
        if is_matrix(row) and row["relative_change"] and not beginning(row)
    }
    if len(changes) < _FEWEST:
        return
    median = statistics.median(changes.values())
    for layer, change in changes.items():
        if change > limit * median:
            cause = (
                f"It changed by {change:.3g} of its norm, {change / median:.3g} times the median."
            )
            yield Issue(layer, "peers", "warning", cause, WATCH, change, limit * median,
                        change / (limit * median))  # fmt: skip


def limits_of_preset(preset: str, thresholds: Limits) -> Limits:
    """Raises `ConfigError` for a preset or threshold that there is not, or that is no number."""
    if preset not in LIMITS:
        raise ConfigError(f"There is no preset {preset!r}; there are {', '.join(LIMITS)}.")
    return limits_with(preset, LIMITS[preset], thresholds)


def _classic(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    if row["not_finite_after"] or row["not_finite_before"]:
        yield _not_finite(layer, row)
        return
    yield from norm_issues(layer, row, limits, classic=True)
    growth = row.get("condition_growth")
    if growth is not None and growth > limits["condition_growth"]:
        yield _collapse(layer, row, limits["condition_growth"], "critical")
    if _stalled(row, limits["stall"]):
        cause = f"Its norm is {row['l2_norm_ratio']:.4f} times what it was: it may not be learning."
        remedy = "Is it frozen, or its learning rate too low?"
        yield Issue(layer, "stall", "warning", cause, remedy, row["l2_norm_ratio"], limits["stall"])


def _stalled(row: Row, limit: float) -> bool:
    """Is the norm as it was, and did the matrix not turn either?

    The guide looks at the norm alone, which stays within 1 % in many layers that learn well; and
    gains of normalisation are near 1 for as long as they live.
    """
    ratio, change = row["l2_norm_ratio"], row["relative_change"]
    if ratio is None or not 1 - limit <= ratio <= 1 + limit:
        return False
    still = is_matrix(row) and change is not None
    # A norm that is the limit's share larger moved by as much, but for rounding.
    return row["unchanged"] == 1 or (still and change <= limit * (1 + 1e-9))


def _not_finite(layer: str, row: Row) -> Issue:
    after, before = row["not_finite_after"], row["not_finite_before"]
    if not after:
        cause = f"It held {before:,} NaN or infinite values: how far it went cannot be told."
        return Issue(layer, "not finite", "info", cause, "Are the checkpoints in their order?",
                     before, 0.0)  # fmt: skip
    earlier = f"{before:,}" if before else "none"
    cause = f"{_count(after)} NaN or infinite; {earlier} before."
    return Issue(layer, "not finite", "critical", cause, STOP, after, 0.0, math.inf)


def _count(values: int) -> str:
    return "1 of its values is" if values == 1 else f"{values:,} of its values are"


def _default(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    if row["not_finite_after"] or row["not_finite_before"]:
        yield _not_finite(layer, row)
        return
    yield from norm_issues(layer, row, limits)
    yield from _conditioning(layer, row, limits)
    yield from _direction(layer, row, limits)
    yield from _stall(layer, row, limits)


def _collapse(layer: str, row: Row, limit: float, severity: Severity) -> Issue:
    growth, after = row["condition_growth"], row["condition_after"]
    cause = f"Its condition number is {growth:.3g} times what it was, now {after:.3g}: directions "
    remedy = "Compute it in a higher precision; regularise it, or lower the learning rate."
    return Issue(layer, "collapse", severity, f"{cause}vanish.", remedy, growth, limit,
                 growth / limit)  # fmt: skip


def _conditioning(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    growth, limit = row.get("condition_growth"), limits["condition_growth"]
    known = "condition_growth" not in row.get("unresolved", {})
    if growth is not None and known and growth > limit and _extreme(row, limits["condition_ratio"]):
        yield _collapse(layer, row, limit, "warning")
    ranks, least = row.get("effective_rank_ratio"), limits["rank_ratio"]
    if ranks is not None and ranks < least:
        cause = f"Its effective rank is {ranks:.3g} of what it was: it collapses."
        remedy = "Regularise it; look for a loss that only a few directions serve."
        excess = least / ranks if ranks else float("inf")
        yield Issue(layer, "collapse", "warning", cause, remedy, ranks, least, excess)


def _extreme(row: Row, limit: float) -> bool:
    """Is the condition number beyond what matrices of this shape have?

    Those of square ones come and go a hundredfold from step to step.
    """
    shape = row["shape"][1:] if row["kind"] == "experts" else row["shape"]
    typical = typical_condition(shape[0], math.prod(shape[1:]))
    return bool(row["condition_after"] > limit * typical)


def _direction(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    cosine, change, row_change = row["cosine"], row["relative_change"], row["row_change_max"]
    if is_matrix(row) and not beginning(row) and _replaced(row, limits["cosine"]):
        cause = f"Its cosine with what it was is {cosine:.3g}: it is another matrix by now."
        remedy = "Was it initialised anew, permuted, or is this another model?"
        excess = 1 + limits["cosine"] - cosine
        yield Issue(layer, "replaced", "warning", cause, remedy, cosine, limits["cosine"], excess)
    elif row_change is not None and row_change > limits["row_change"] * max(change or 0.0, 1.0):
        where = "A row" if row["row_change_at"] is None else f"Row {row['row_change_at']:,}"
        cause = f"{where} moved by {row_change:.3g} times its own norm."
        remedy = "A token or unit of its own? Look at the gradients of this row."
        limit = limits["row_change"]
        yield Issue(layer, "row", "info", cause, remedy, row_change, limit, row_change / limit)


def _replaced(row: Row, limit: float) -> bool:
    """Is what it was gone, and not only little beside what was added?"""
    cosine, ratio = row["cosine"], row["l2_norm_ratio"]
    return cosine is not None and cosine < limit and cosine * ratio < limit


def _stall(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    change, same = row["relative_change"], row["unchanged"]
    if same == 1:
        cause = "Not one of its values changed."
        yield Issue(layer, "stall", "info", cause, "Is it meant to be frozen?", 0.0, 0.0)
    elif change is not None and change < limits["stall"]:
        cause = f"It changed by {change:.2g} of its norm."
        remedy = "Is its learning rate too low, or its gradient cut off?"
        yield Issue(layer, "stall", "warning", cause, remedy, change, limits["stall"])
    elif same is not None and same > limits["lost_updates"] and row["dtype_after"] in _NARROW:
        cause = (
            f"{same:.2%} of its values are as they were: steps below {row['dtype_after']} are lost."
        )
        remedy = "Keep master weights in float32, or round stochastically."
        yield Issue(layer, "lost updates", "info", cause, remedy, same, limits["lost_updates"])


_NARROW = ("bfloat16", "float16")
