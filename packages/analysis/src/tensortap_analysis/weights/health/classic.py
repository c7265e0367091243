"""The thresholds of the older guide, as they were: comparable with scores of before.

NaN, all-zero matrices, dead rows and norms unlike any other are in the guide's list of problems
too, without thresholds: they are judged as by `default`, with the guide's severities. What is
known to be wrong with its thresholds is in the documentation of `default`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tensortap_analysis.weights.health import gains, peers, values
from tensortap_analysis.weights.health.issue import Issue, Layer, Limits, Rule, Severity, over

LIMITS: Mapping[str, float] = {
    "condition_critical": 1e5,
    "condition_warning": 1e4,
    "outliers_critical": 10.0,
    "outliers_warning": 1.0,
    "stable_ratio": 0.1,
    "rank": 0.3,
    **peers.LIMITS,
    **gains.LIMITS,
    "dead": values.LIMITS["dead"],
}
_STEPS: tuple[Severity, ...] = ("critical", "warning")
_STABILITY = (
    "Normalise before and after it, keep it in FP32, clip gradients at 1.0, lower the learning "
    "rate."
)
_OUTLIERS: Mapping[str, str] = {
    "critical": "Keep it in FP16 or BF16, or move outliers into activations (SmoothQuant).",
    "warning": "Quantise per channel or to 16 bits, or use SmoothQuant.",
}


def score(issues: Sequence[Issue], layers: int) -> float:
    """100, less 10 for each critical issue and 3 for each warning, not below 0."""
    critical = sum(issue.severity == "critical" for issue in issues)
    warnings = sum(issue.severity == "warning" for issue in issues)
    return float(max(0, 100 - 10 * critical - 3 * warnings))


def _condition(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        value = layer.get("spectral", "condition_number")
        for severity in _STEPS if value is not None else ():
            limit = limits[f"condition_{severity}"]
            if value > limit:
                cause = f"Its condition number is {value:.3g}: small errors can grow by as much."
                yield Issue(
                    layer.name, "condition", severity, cause, _STABILITY, value, limit,
                    over(value, limit),
                )  # fmt: skip
                break


def _outliers(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        value = layer.get("quantization", "extreme_outlier_percentage")
        for severity in _STEPS if value is not None else ():
            limit = limits[f"outliers_{severity}"]
            if value > limit:
                cause = f"{value:.3g} % of its values are beyond 3 standard deviations."
                yield Issue(
                    layer.name, "outliers", severity, cause, _OUTLIERS[severity], value, limit,
                    over(value, limit),
                )  # fmt: skip
                break


def _redundancy(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    for layer in layers:
        stable, total = layer.get("spectral", "stable_rank"), layer.get("spectral", "total_rank")
        if stable is None or not total or stable / total >= limits["stable_ratio"]:
            continue
        ratio = stable / total
        full = layer.get("spectral", "full_rank")
        of = f" of {full:,}" if full and full != total else ""
        cause = f"Its stable rank is {stable:.1f}, and its total rank {total:,}{of}."
        remedy = "See what rank it needs: tensortap scan --recommend compress."
        limit = limits["stable_ratio"]
        yield Issue(layer.name, "redundancy", "info", cause, remedy, ratio, limit,
                    over(limit, ratio))  # fmt: skip


def _rank(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """The guide's overview of problems: an effective rank below 30 % is redundancy.

    By the rank that the dtype can tell, for the stable rank of a low rank is not small beside it.
    """
    limit = limits["rank"]
    for layer in layers:
        rank, full = layer.get("spectral", "total_rank"), layer.get("spectral", "full_rank")
        if rank and full and rank / full < limit:
            cause = f"Its rank is {rank:,} of {full:,}: most of its directions carry nothing."
            remedy = "See what rank it needs: tensortap scan --recommend compress."
            yield Issue(layer.name, "rank", "info", cause, remedy, rank / full, limit,
                        over(limit, rank / full))  # fmt: skip


def _dead(layers: Sequence[Layer], limits: Limits) -> Iterator[Issue]:
    """However many they are, the guide calls them a small matter."""
    return values.dead(layers, {"dead": 1.0})


RULES: Mapping[str, Rule] = {
    "not finite": values.not_finite,
    "zero": values.zero,
    "dead experts": values.dead_experts,
    "condition": _condition,
    "outliers": _outliers,
    "redundancy": _redundancy,
    "rank": _rank,
    "dead": _dead,
}
