"""What is odd about a drift: explosion, collapse, stall; with cause and remedy.

`classic` has the thresholds of the older guide. They look at the ratio of norms, which is 1 for two
unrelated matrices and for one that only turned; `default` looks at the change itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensortap.errors import ConfigError, nearest
from tensortap_analysis.weights.drift.tracking import Drift
from tensortap_analysis.weights.health import SEVERITIES, Issue, Severity

Row = Mapping[str, Any]
Limits = Mapping[str, float]

LIMITS: Mapping[str, Limits] = {
    "classic": {"explosion": 10.0, "ratio": 2.0, "condition_growth": 100.0, "stall": 0.01},
    "default": {
        "explosion": 10.0, "ratio": 2.0, "condition_growth": 100.0, "rank_ratio": 0.5,
        "cosine": 0.5, "row_change": 10.0, "peers": 10.0, "stall": 1e-6, "lost_updates": 0.99,
    },
}  # fmt: skip
_STOP = "Stop, go back to the checkpoint before, lower the learning rate tenfold, clip gradients."
_FEWEST = 4
"""Matrices, below which there is no saying what is usual."""
_WATCH = "Watch the learning rate and the gradient norm of these steps."


def alerts(drift: Drift, preset: str = "default", thresholds: Limits | None = None) -> list[Issue]:
    """Issues of all layers, the most severe first, then those farthest beyond their limit.

    `thresholds` replace limits of the preset. Raises `ConfigError` for one that it does not have.
    """
    limits = _limits(preset, thresholds or {})
    rules = _classic if preset == "classic" else _default
    found = [issue for layer, row in drift.layers.items() for issue in rules(layer, row, limits)]
    if "peers" in limits:
        told = {issue.layer for issue in found if issue.severity != "info"}
        apart = _among_peers(drift.layers, limits["peers"])
        found += [issue for issue in apart if issue.layer not in told]
    return _ranked(found)


def overall_alerts(
    steps: Sequence[Drift], preset: str = "default", thresholds: Limits | None = None
) -> list[Issue]:
    """Norms that grew or vanished over all steps together, each of which may look harmless."""
    limits = _limits(preset, thresholds or {})
    found: list[Issue] = []
    for layer in dict.fromkeys(layer for step in steps for layer in step.layers):
        rows = [step.layers[layer] for step in steps if layer in step.layers]
        ratio = _over_all(rows)
        found += _explosion(layer, ratio, limits, vanishing="critical")
    return _ranked(found)


def _over_all(rows: Sequence[Row]) -> float | None:
    """The last norm over the first, where there is more than one step."""
    first, last = rows[0]["l2_before"], rows[-1]["l2_after"]
    return last / first if len(rows) > 1 and first and last is not None else None


def _ranked(found: list[Issue]) -> list[Issue]:
    return sorted(found, key=lambda issue: (SEVERITIES.index(issue.severity), -issue.excess))


def _among_peers(layers: Mapping[str, Row], limit: float) -> Iterator[Issue]:
    """Matrices that changed many times as much as most others in the same step."""
    changes = {
        layer: row["relative_change"]
        for layer, row in layers.items()
        if row["kind"] != "vector" and row["relative_change"]
    }
    if len(changes) < _FEWEST:
        return
    median = statistics.median(changes.values())
    for layer, change in changes.items():
        if change > limit * median:
            cause = (
                f"It changed by {change:.3g} of its norm, {change / median:.3g} times the median."
            )
            yield Issue(layer, "peers", "warning", cause, _WATCH, change, limit * median,
                        change / (limit * median))  # fmt: skip


def _limits(preset: str, thresholds: Limits) -> Limits:
    if preset not in LIMITS:
        raise ConfigError(f"There is no preset {preset!r}; there are {nearest(preset, LIMITS)}.")
    for name in thresholds:
        if name not in LIMITS[preset]:
            known = nearest(name, LIMITS[preset])
            raise ConfigError(f"The preset {preset} has no threshold {name!r}; it has {known}.")
    return {**LIMITS[preset], **thresholds}


def _classic(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    ratio = row["l2_norm_ratio"]
    yield from _explosion(layer, ratio, limits, vanishing="warning")
    growth = row.get("condition_growth")
    if growth is not None and growth > limits["condition_growth"]:
        yield _collapse(layer, growth, limits["condition_growth"], "critical")
    if ratio is not None and abs(ratio - 1) <= limits["stall"]:
        cause = f"Its norm is {ratio:.4f} times what it was: it may not be learning."
        remedy = "Is it frozen, or its learning rate too low?"
        yield Issue(layer, "stall", "warning", cause, remedy, ratio, limits["stall"])


def _default(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    broken = row["not_finite_after"]
    if broken:
        cause = f"{broken:,} of its values are NaN or infinite, {row['not_finite_before']:,} were."
        yield Issue(layer, "not finite", "critical", cause, _STOP, broken, 0.0, float("inf"))
        return
    yield from _explosion(layer, row["l2_norm_ratio"], limits, vanishing="critical")
    yield from _conditioning(layer, row, limits)
    yield from _direction(layer, row, limits)
    yield from _stall(layer, row, limits)


def _explosion(
    layer: str, ratio: float | None, limits: Limits, *, vanishing: Severity
) -> Iterator[Issue]:
    """A norm that is many times what it was, or few; `vanishing`: how bad the latter is at most."""
    if ratio is None:
        return
    grew = ratio > 1
    far = ratio if grew else 1 / ratio if ratio else float("inf")
    severe = far > limits["explosion"]
    limit = limits["explosion" if severe else "ratio"]
    if far > limit:
        severity: Severity = "warning" if not severe else "critical" if grew else vanishing
        cause = f"Its norm is {ratio:.3g} times what it was."
        word, remedy = "explosion" if grew else "vanishing", _STOP if severe else _WATCH
        yield Issue(layer, word, severity, cause, remedy, ratio, limit, far / limit)


def _collapse(layer: str, growth: float, limit: float, severity: Severity) -> Issue:
    cause = f"Its condition number is {growth:.3g} times what it was: directions vanish."
    remedy = "Compute it in a higher precision; regularise it, or lower the learning rate."
    return Issue(layer, "collapse", severity, cause, remedy, growth, limit, growth / limit)


def _conditioning(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    growth, limit = row.get("condition_growth"), limits["condition_growth"]
    known = "condition_growth" not in row.get("unresolved", {})
    if growth is not None and known and growth > limit:
        yield _collapse(layer, growth, limit, "warning")
    ranks, least = row.get("effective_rank_ratio"), limits["rank_ratio"]
    if ranks is not None and ranks < least:
        cause = f"Its effective rank is {ranks:.3g} of what it was: it collapses."
        remedy = "Regularise it; look for a loss that only a few directions serve."
        excess = least / ranks if ranks else float("inf")
        yield Issue(layer, "collapse", "warning", cause, remedy, ranks, least, excess)


def _direction(layer: str, row: Row, limits: Limits) -> Iterator[Issue]:
    cosine, change, row_change = row["cosine"], row["relative_change"], row["row_change_max"]
    if cosine is not None and change is not None and cosine < limits["cosine"] and change > 0.5:
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
