"""The rules that judge what a metric can tell, for the shape and dtype it was measured in.

They differ from the older guide's thresholds (`classic`) where those are wrong:

- A condition number grows with the size: that of a square matrix of independent normal values is
  around 4.6 times its side (Edelman 1988), so 1e4 is ordinary for a side of 4096. It is judged
  against that, and not at all where the stored dtype cannot resolve it.
- At most 1/9 of any values lie beyond 3 standard deviations (Chebyshev), so 10 % hardly ever
  occurs. Quantisation is judged by the SQNR that int8 with a scale a channel reaches; with one
  scale for all a perfect normal matrix of 4096 x 4096 has 37.8 dB.
- A stable rank falls with a single large singular value. What can be compressed is judged by the
  rank that holds 99 % of the energy.
- The rank that the stored dtype can tell from rounding is less than full of any matrix in 4 bits;
  it is held against what a random matrix of the shape would have left.
- The score is an average over layers, so that it means the same for small and large models; but no
  model with a warning is called good, and none with anything critical may be deployed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from tensortap_analysis.weights.digits import below
from tensortap_analysis.weights.health import gains, peers, values
from tensortap_analysis.weights.health.issue import Issue, Layer, Limits, Rule, over
from tensortap_analysis.weights.health.outliers import standing_out
from tensortap_analysis.weights.health.places import largest
from tensortap_analysis.weights.measures.outliers import FAR

LIMITS: Mapping[str, float] = {
    "condition_ratio": 1000.0,
    "sqnr_critical": 15.0,
    "sqnr_warning": 30.0,
    "sqnr_tensor": 30.0,
    "energy_rank": 0.25,
    "rank": 0.95,
    "rank_warning": 0.25,
    **values.LIMITS,
    **peers.LIMITS,
    **gains.LIMITS,
}
_PENALTY = {"critical": 1.0, "warning": 0.3, "info": 0.0}
_TRAINED, _STEPS = 2.0, 64
"""Spectra of trained matrices fall to half of what random ones have in their tail, say."""
_WIDE = ("fp16", "bf16")
_MOST: Mapping[str, float] = {"critical": 59.0, "warning": 79.0, "info": 100.0}
"""The score of so many layers that one bad one is lost in the average. Each is where the verdict
changes: one layer that exploded, or is of rank 4, spoils what all others compute.
"""


def score(issues: Sequence[Issue], layers: int) -> float:
    """100 times the mean over layers, each less 1 (critical) or 0.3 (warning) for its worst issue.

    Where anything is critical, 59 times the mean; where there is a warning, 79 times.
    """
    worst: dict[str, float] = {}
    for issue in issues:
        worst[issue.layer] = max(worst.get(issue.layer, 0.0), _PENALTY[issue.severity])
    mean = max(0.0, 1 - sum(worst.values()) / max(layers, 1))
    return mean * min((_MOST[issue.severity] for issue in issues), default=100.0)


def typical_condition(rows: int, columns: int) -> float:
    """The condition number of a matrix of independent normal values of this shape, about.

    (1 + sqrt(g)) / (1 - sqrt(g)) with g the ratio of the sides (Marchenko and Pastur 1967), up to
    e^1.537 n for a square one, the exponential of the mean logarithm (Edelman 1988).
    """
    small, large = min(rows, columns), max(rows, columns)
    square = math.exp(1.537) * small
    ratio = math.sqrt(small / large) if large else 1.0
    return square if ratio == 1 else min((1 + ratio) / (1 - ratio), square)


def _condition(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        metric = "condition_number"
        value = layer.get("spectral", metric)
        rows, columns = layer.get("sparsity", "rows"), layer.get("sparsity", "columns")
        if rows is None and len(layer.facts.shape) > 1:
            rows, columns = layer.facts.shape[-2:]
        if value is None or not rows or not columns or layer.zero:
            continue
        if _dead_alone(layer, value, limits):
            metric = "condition_number_alive"
            value = layer.get("spectral", metric) or 0.0
        limit = limits["condition_ratio"] * typical_condition(rows, columns)
        if value > limit and layer.unresolved("spectral", metric) is None:
            cause = (
                f"Its condition number is {value:.3g}, and {typical_condition(rows, columns):.3g} "
                "is typical of its shape: some directions all but vanish in it."
            )
            remedy = (
                "Keep it in float32 where it is inverted, merged or factorised; look for a "
                "collapsed head or a learning rate that was too high."
            )
            yield Issue(layer.name, "condition", "warning", cause, remedy, value, limit,
                        over(value, limit))  # fmt: skip


def _dead_alone(layer: Layer, value: float, limits: Limits) -> bool:
    """Do all-zero rows and columns, which have a rule of their own, make it singular?"""
    dead = [layer.get("sparsity", what) for what in ("dead_rows", "dead_columns")]
    rank = layer.get("spectral", "total_rank")
    if value < math.inf or not any(dead) or rank is None:
        return False
    alive = min(layer.get("sparsity", "rows") - dead[0], layer.get("sparsity", "columns") - dead[1])
    return bool(rank >= limits["rank"] * alive)


def _channel_sqnr(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        value = layer.get("quantization", "sqnr_db_per_channel")
        if value is None or layer.zero or value >= limits["sqnr_warning"]:
            continue
        severe = value < limits["sqnr_critical"]
        limit = limits["sqnr_critical" if severe else "sqnr_warning"]
        cause = f"int8 leaves {below(value, limit)} dB even with a scale for each channel."
        cause += standing_out(layer) or _top(layer)
        remedy = _blocks(layer, limit)
        yield Issue(layer.name, "sqnr", "critical" if severe else "warning", cause, remedy,
                    value, limit, 10 ** ((limit - value) / 20))  # fmt: skip


def _top(layer: Layer) -> str:
    """The largest value, where it stands out."""
    top = largest(layer)
    return f" {top}." if top is not None and top.times > FAR else ""


def _blocks(layer: Layer, limit: float) -> str:
    """What to keep it in: a format with small blocks only where one was found to be better."""
    kept: Mapping[str, float | None] = layer.get("quantization", "formats") or {}
    better = [n for n, db in kept.items() if db is not None and db >= limit and n not in _WIDE]
    if not kept:
        return "Keep it in bfloat16, or scan it with --formats for one with small blocks."
    if better:
        return f"Enough is left by {', '.join(better)}; else keep it in bfloat16."
    return "None of the formats measured leaves enough: keep it in bfloat16."


def _tensor_sqnr(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    limit = limits["sqnr_tensor"]
    for layer in layers:
        value = layer.get("quantization", "sqnr_db")
        channel = layer.get("quantization", "sqnr_db_per_channel")
        if value is None or channel is None or value >= limit or channel < limits["sqnr_warning"]:
            continue
        cause = (
            f"int8 leaves {below(value, limit)} dB with one scale, {channel:.1f} dB with one a "
            "channel."
        )
        cause += standing_out(layer) or _top(layer)
        remedy = "Quantise it per channel, or in blocks."
        yield Issue(layer.name, "sqnr_tensor", "info", cause, remedy, value, limit,
                    10 ** ((limit - value) / 20))  # fmt: skip


def _redundancy(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        rank, full = layer.get("spectral", "energy_rank_99"), layer.get("spectral", "full_rank")
        if rank is None or not full or layer.zero or rank / full >= limits["energy_rank"]:
            continue
        cause = f"{rank} of its {full} directions hold 99 % of its energy."
        remedy = "A factorisation would be smaller: --recommend compress says how much."
        limit = limits["energy_rank"]
        yield Issue(layer.name, "redundancy", "info", cause, remedy, rank / full, limit,
                    over(limit, rank / full))  # fmt: skip


def _deficiency(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        rank, full = layer.get("spectral", "total_rank"), layer.get("spectral", "full_rank")
        if rank is None or not full or layer.zero:
            continue
        expected = full * (1 - _below_tolerance(layer)) - _dead(layer)
        if rank >= limits["rank"] * expected:
            continue
        # Tables of sines, which tell positions, have few directions by design.
        severe = rank < limits["rank_warning"] * expected and layer.facts.kind != "embedding"
        limit = limits["rank_warning" if severe else "rank"]
        cause = (
            f"Its rank is {rank:,} of {full:,}: {full - rank:,} directions carry nothing that "
            f"{layer.facts.dtype} can tell from rounding."
        )
        remedy = (
            "Expected of merged, factorised or pruned weights; else look for copied rows, or for "
            "inputs or gradients that collapsed."
        )
        share = rank / expected
        yield Issue(layer.name, "rank", "warning" if severe else "info", cause, remedy, share,
                    limit, over(limit, share))  # fmt: skip


def _dead(layer: Layer) -> int:
    """Directions that all-zero rows and columns, which have a rule of their own, take away."""
    if layer.count != 1:
        return 0
    dead = [layer.get("sparsity", what) or 0 for what in ("dead_rows", "dead_columns")]
    sides = [layer.outputs - dead[0], layer.inputs - dead[1]]
    return max(0, min(layer.outputs, layer.inputs) - min(sides))


def _below_tolerance(layer: Layer) -> float:
    """The share of singular values that rounding hides in a healthy matrix of this shape."""
    stable, largest = layer.get("spectral", "stable_rank"), layer.get("spectral", "s_max")
    tolerance = layer.get("spectral", "rank_tolerance")
    if not stable or not largest or not tolerance:
        return 0.0
    # ||W||_F / sqrt(short side) is what all singular values have in the root mean square.
    usual = largest * math.sqrt(stable / layer.get("spectral", "full_rank"))
    return hidden(_TRAINED * tolerance / usual, layer.outputs, layer.inputs)


def hidden(tolerance: float, rows: int, columns: int) -> float:
    """The share of a random matrix's singular values below `tolerance` times their rms.

    By the law of Marchenko and Pastur (1967) for their squares: with g the ratio of the sides,
    between (1 - sqrt(g))^2 and (1 + sqrt(g))^2 with the density
    sqrt((x - low) (high - x)) / (2 pi g x).
    """
    small, large = min(rows, columns), max(rows, columns)
    ratio = small / large if large else 1.0
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    edge = min(tolerance, math.sqrt(high))
    if edge <= math.sqrt(low):
        return 0.0
    # In s = sqrt(x), where a square matrix has no pole: the midpoint rule is enough.
    step = (edge - math.sqrt(low)) / _STEPS
    points = [(math.sqrt(low) + (at + 0.5) * step) for at in range(_STEPS)]
    density = (math.sqrt((s * s - low) * (high - s * s)) / (math.pi * ratio * s) for s in points)
    return min(1.0, step * math.fsum(density))


RULES: Mapping[str, Rule] = {
    **values.RULES,
    "condition": _condition,
    "sqnr": _channel_sqnr,
    "sqnr_tensor": _tensor_sqnr,
    "rank": _deficiency,
    "redundancy": _redundancy,
}
