"""A layer that exploded or vanished: among those of the same role in other depths, or by itself."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

from tensortap_analysis.weights.health.issue import Issue, Layer, Limits

LIMITS: Mapping[str, float] = {
    "norm_ratio": 4.0,
    "norm_spreads": 6.0,
    "gain_high": 100.0,
    "gain_low": 1e-4,
}
_PRODUCTS = ("linear", "convolution", "experts")
_FEWEST = 4
"""Peers below which there is no saying what is usual."""


def norms(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Root mean squares far from the median of their peers, and what no layer should have.

    Far is beyond `norm_ratio` times it, and beyond `norm_spreads` median absolute deviations of
    the logarithm: where norms grow or fall with the depth, all are ordinary. Where all have
    exploded, or there are no peers, the gain tells: outputs over independent inputs, which is 0.5
    to 2 after any usual initialisation and is judged beyond `gain_high` and below `gain_low`.
    """
    alone = {issue.layer: issue for layer in layers for issue in _gains(layer, limits)}
    yield from alone.values()
    for group in _groups(layers):
        logs = {layer.name: math.log(size) for layer, size in group}
        median = statistics.median(logs.values())
        spread = statistics.median(abs(log - median) for log in logs.values())
        limit = max(math.log(limits["norm_ratio"]), limits["norm_spreads"] * spread)
        for layer, size in group:
            if layer.name not in alone and abs(logs[layer.name] - median) > limit:
                yield _issue(layer, size, math.exp(median), math.exp(limit))


def _gains(layer: Layer, limits: Limits) -> Iterator[Issue]:
    size = None if layer.vector or layer.facts.kind not in _PRODUCTS else _size(layer)
    if size is None:
        return
    gain, high, low = size * math.sqrt(layer.inputs), limits["gain_high"], limits["gain_low"]
    if low <= gain <= high or (gain < low and "lora_b" in layer.name.lower()):
        return
    cause = (
        f"Its outputs are {gain:.3g} times its inputs, for independent ones: it has "
        f"{'exploded' if gain > high else 'vanished'}."
    )
    limit = high if gain > high else low
    yield Issue(layer.name, "norm", "warning", cause, _REMEDIES[gain > high], gain, limit,
                max(gain / limit, limit / gain))  # fmt: skip


def _size(layer: Layer) -> float | None:
    """Root mean square of the values; `None` for zeros, which have a rule of their own."""
    l2 = layer.get("norms", "l2")
    if not l2 or not layer.facts.numel:
        return None
    return float(min(l2, sys.float_info.max)) / math.sqrt(layer.facts.numel)


def _groups(layers: Sequence[Layer]) -> list[list[tuple[Layer, float]]]:
    """Layers of one role, and their root mean squares."""
    groups: dict[tuple[str, str], list[tuple[Layer, float]]] = {}
    for layer in layers:
        size = _size(layer)
        if layer.role != layer.name and not layer.vector and size is not None:
            groups.setdefault((layer.role, layer.facts.kind), []).append((layer, size))
    return [group for group in groups.values() if len(group) >= _FEWEST]


def _issue(layer: Layer, size: float, usual: float, limit: float) -> Issue:
    ratio = size / usual
    times = f"{ratio:.3g}x" if ratio > 1 else f"1/{1 / ratio:.3g} of"
    cause = (
        f"Its root mean square is {size:.3g}, {times} the median of the other "
        f"{layer.role} ({usual:.3g}): it has {'exploded' if ratio > 1 else 'vanished'}."
    )
    excess = max(ratio, 1 / ratio) / limit
    return Issue(layer.name, "norm", "warning", cause, _REMEDIES[ratio > 1], ratio, limit, excess)


_REMEDIES = {
    True: "Clip gradients and lower its learning rate.",
    False: "Check its initialisation, its weight decay, and whether gradients reach it.",
}
