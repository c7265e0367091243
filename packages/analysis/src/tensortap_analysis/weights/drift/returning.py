"""Alerts over several steps: what went back to where it was has recovered; it is no accident."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from tensortap_analysis.weights.drift.alerts import alerts, limits_of_preset, ranked
from tensortap_analysis.weights.drift.growth import whole_way
from tensortap_analysis.weights.drift.tracking import Drift
from tensortap_analysis.weights.health import Issue

_NORMS = ("explosion", "vanishing")


def alerts_of_steps(
    steps: Sequence[Drift], preset: str = "default", thresholds: Mapping[str, float] | None = None
) -> list[list[Issue]]:
    """`alerts` of each step, where norms that came back are an `info`.

    A norm came back where it left in the step before and is now within `ratio` of what it was.
    """
    limit = limits_of_preset(preset, thresholds or {})["ratio"]
    found = [alerts(step, preset, thresholds) for step in steps]
    for at in range(1, len(steps)):
        left = {issue.layer: issue.rule for issue in found[at - 1] if issue.rule in _NORMS}
        found[at] = ranked(_softened(found[at], left, steps[at - 1 : at + 1], limit))
    return found


def _softened(
    issues: Iterable[Issue], left: Mapping[str, str], steps: Sequence[Drift], limit: float
) -> Iterator[Issue]:
    for issue in issues:
        back = _back(issue.layer, steps) if issue.rule in _NORMS else None
        opposite = left.get(issue.layer) in _NORMS and left[issue.layer] != issue.rule
        if back is None or not opposite or not 1 / limit <= back <= limit:
            yield issue
            continue
        cause = f"Its norm came back: it is {back:.3g} times what it was before the last step."
        remedy = "It was the step before that went wrong."
        yield replace(issue, rule="return", severity="info", cause=cause, remedy=remedy)


def _back(layer: str, steps: Sequence[Drift]) -> float | None:
    """The norm after the last step over that before the first."""
    rows = [step.layers[layer] for step in steps if layer in step.layers]
    way = whole_way(rows)
    return None if way is None else float(way["l2_norm_ratio"])
