"""A layer that exploded or vanished: among those of the same role in other depths, or by itself."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

from tensortap_analysis.weights.health.issue import Issue, Layer, Limits, Severity
from tensortap_analysis.weights.health.outliers import explains, in_one_value, standing_out
from tensortap_analysis.weights.health.places import ONE_VALUE, largest
from tensortap_analysis.weights.roles import FEWEST

LIMITS: Mapping[str, float] = {
    "norm_ratio": 4.0,
    "norm_critical": 100.0,
    "norm_spreads": 6.0,
    "gain_high": 100.0,
    "gain_critical": 1e4,
    "gain_low": 1e-4,
    "gain_alone": 30.0,
}
_PRODUCTS = ("linear", "convolution", "experts")


def norms(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """Root mean squares far from the median of their peers, and what no layer should have.

    Of peers that have different numbers of inputs the gains are compared.

    Far is beyond `norm_ratio` times it, and beyond `norm_spreads` median absolute deviations of
    the logarithm: where norms grow or fall with the depth, all are ordinary. Where all have
    exploded, or there are no peers, the gain tells: outputs over independent inputs, which is 0.5
    to 2 after any usual initialisation and is judged beyond `gain_high` and below `gain_low`.

    An explosion is critical beyond `norm_critical` times its peers, or `norm_critical` times the
    median gain of all layers with a gain beyond `gain_high`: training does not take one layer
    there, and outputs so large are all that the layers after it see. It is critical beyond
    `gain_critical` whatever the others have: two such layers end float16. Where a layer has no
    peers, `gain_alone` and as many times the median gain of all others is a warning, and
    `norm_critical` times is critical.
    """
    found: dict[str, Issue] = {}
    for issue in (*_unlike_peers(layers, limits), *_gains(layers, limits)):
        before = found.get(issue.layer)
        # The first one names the peers; the second counts where it is worse.
        if before is None or (issue.severity, before.severity) == ("critical", "warning"):
            found[issue.layer] = issue
    yield from found.values()


def _unlike_peers(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for group in _groups(layers):
        # Of different widths, as of convolutions one after the other, the values say nothing.
        wide = len({layer.inputs for layer, _ in group}) > 1
        scale = {layer.name: math.sqrt(layer.inputs) if wide else 1.0 for layer, _ in group}
        logs = {layer.name: math.log(size * scale[layer.name]) for layer, size in group}
        median = statistics.median(logs.values())
        spread = statistics.median(abs(log - median) for log in logs.values())
        limit = max(math.log(limits["norm_ratio"]), limits["norm_spreads"] * spread)
        for layer, size in group:
            if abs(logs[layer.name] - median) > limit:
                usual = math.exp(median) / scale[layer.name]
                yield _unlike(layer, size, usual, math.exp(limit), limits)


def _gains(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    gains = {layer.name: gain for layer in layers if (gain := _gain(layer)) is not None}
    usual = statistics.median(gains.values()) if len(gains) >= FEWEST else math.inf
    compared = {layer.name for group in _groups(layers) for layer, _ in group}
    alone, low = limits["gain_alone"], limits["gain_low"]
    for layer in layers:
        gain = gains.get(layer.name, 1.0)
        by_itself = layer.name not in compared and gain > alone * usual
        high = min(alone, limits["gain_high"]) if by_itself else limits["gain_high"]
        if low <= gain <= high or (gain < low and "lora_b" in layer.name.lower()):
            continue
        cause = (
            f"Its outputs are {gain:.3g} times its inputs, for independent ones: it has "
            f"{'exploded' if gain > high else 'vanished'}."
        )
        if by_itself:
            cause = f"{cause[:-1]}, for {usual:.3g} is the median of all."
        far = gain > high and gain > limits["norm_critical"] * usual
        severe = far or gain > limits["gain_critical"]
        limit = high if gain > high else low
        yield _issue(layer, cause, severe, gain, limit, max(gain / limit, limit / gain))


def _gain(layer: Layer) -> float | None:
    size = None if layer.vector or layer.facts.kind not in _PRODUCTS else _size(layer)
    return None if size is None else size * math.sqrt(layer.inputs)


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
    return [group for group in groups.values() if len(group) >= FEWEST]


def unjudged(layers: Sequence[Layer]) -> list[str]:
    """What had too few peers to be held against, in a sentence; empty where nothing had."""
    compared = {layer.name for group in _groups(layers) for layer, _ in group}
    lonely = [
        layer for layer in layers
        if layer.name not in compared and layer.role != layer.name and _gain(layer) is not None
    ]  # fmt: skip
    if not lonely:
        return []
    roles = list(dict.fromkeys(layer.role for layer in lonely))
    more = "" if len(roles) == 1 else f" and {_counted(len(roles) - 1)}"
    return [
        f"There are fewer than {FEWEST} depths of {roles[0]}{more} to compare sizes: judged by "
        "what their outputs are for independent inputs, and only where that is far from all others."
    ]


def _counted(roles: int) -> str:
    """`1 more role`, `2 more roles`."""
    return f"{roles:,} more role{'s'[: roles != 1]}"


def _unlike(layer: Layer, size: float, usual: float, limit: float, limits: Limits) -> Issue:
    ratio = size / usual
    times = f"{ratio:.3g}x" if ratio > 1 else f"1/{1 / ratio:.3g} of"
    what = "vanished" if ratio < 1 else "grown in a few places" if explains(layer) else "exploded"
    cause = (
        f"Its root mean square is {size:.3g}, {times} the median of the other "
        f"{layer.role} ({usual:.3g}): it has {what}."
    )
    severe = ratio > max(limits["norm_critical"], limit)
    return _issue(layer, cause, severe, ratio, limit, max(ratio, 1 / ratio) / limit)


def _issue(
    layer: Layer, cause: str, severe: bool, value: float, limit: float, excess: float
) -> Issue:
    if value > 1:
        cause += standing_out(layer)
        remedy = _IN_PLACES if explains(layer) else _EXPLODED
        if in_one_value(layer):
            cause, remedy = f"{cause} {largest(layer)}.", ONE_VALUE
    else:
        remedy = _VANISHED
    severity: Severity = "critical" if severe else "warning"
    return Issue(layer.name, "norm", severity, cause, remedy, value, limit, excess)


_EXPLODED = "Clip gradients and lower its learning rate."
_VANISHED = "Check its initialisation, its weight decay, and whether gradients reach it."
_IN_PLACES = (
    "Look at what they read or make; scale them into the layer before (SmoothQuant), or keep it "
    "in 16 bits."
)
