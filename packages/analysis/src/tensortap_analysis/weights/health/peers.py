"""A layer among those of the same role in other depths: exploded, or vanished."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from tensortap_analysis.weights.health.issue import Issue, Layer, Limits

LIMITS: Mapping[str, float] = {"norm_ratio": 4.0, "norm_spreads": 6.0}
_FEWEST = 4
"""Peers below which there is no saying what is usual."""


def norms(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Root mean squares far from the median of their peers.

    Far is beyond `norm_ratio` times it, and beyond `norm_spreads` median absolute deviations of
    the logarithm: where norms grow or fall with the depth, all are ordinary.
    """
    for group in _groups(layers):
        logs = {layer.name: math.log(size) for layer, size in group}
        median = statistics.median(logs.values())
        spread = statistics.median(abs(log - median) for log in logs.values())
        limit = max(math.log(limits["norm_ratio"]), limits["norm_spreads"] * spread)
        for layer, size in group:
            if abs(logs[layer.name] - median) > limit:
                yield _issue(layer, size, math.exp(median), math.exp(limit))


def _groups(layers: Sequence[Layer]) -> list[list[tuple[Layer, float]]]:
    """Layers of one role and their root mean squares; all-zero ones have a rule of their own."""
    groups: dict[tuple[str, str], list[tuple[Layer, float]]] = {}
    for layer in layers:
        l2 = layer.get("norms", "l2")
        if layer.role != layer.name and not layer.vector and l2 and math.isfinite(l2):
            size = l2 / math.sqrt(layer.facts.numel)
            groups.setdefault((layer.role, layer.facts.kind), []).append((layer, size))
    return [group for group in groups.values() if len(group) >= _FEWEST]


def _issue(layer: Layer, size: float, usual: float, limit: float) -> Issue:
    ratio = size / usual
    times = f"{ratio:.3g}x" if ratio > 1 else f"1/{1 / ratio:.3g} of"
    cause = (
        f"Its root mean square is {size:.3g}, {times} the median of the other "
        f"{layer.role} ({usual:.3g}): it has {'exploded' if ratio > 1 else 'vanished'}."
    )
    remedy = (
        "Clip gradients and lower its learning rate."
        if ratio > 1
        else "Check its initialisation, its weight decay, and whether gradients reach it."
    )
    excess = max(ratio, 1 / ratio) / limit
    return Issue(layer.name, "norm", "warning", cause, remedy, ratio, limit, excess)
