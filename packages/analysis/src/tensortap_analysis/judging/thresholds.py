"""Presets of fixed thresholds: `classic`, as the older tools graded, and `port`."""

from __future__ import annotations

from tensortap_analysis.judging.judgement import Judgement, Limits, Preset
from tensortap_analysis.pairs.pair import Pair


def _classic(pair: Pair, limits: Limits, floor: float) -> Judgement:
    """Words of the older tools: for the MSE by powers of ten, for the correlation by nines."""
    mse = pair.rmse * pair.rmse  # not **2, which raises where it does not fit
    steps = (mse < limits["mse"] / 100, mse < limits["mse"] / 10, mse < limits["mse"])
    words = [next((w for w, ok in zip(_SIZES, steps, strict=True) if ok), "large")]
    excess = mse / limits["mse"]
    correlation = pair.metrics.correlation
    if correlation is not None:
        miss, most = 1 - correlation, 1 - limits["correlation"]
        nines = (miss < most / 100, miss < most / 10, miss < most)
        words.append(next((w for w, ok in zip(_NINES, nines, strict=True) if ok), "look at it"))
        excess = max(excess, miss / most)
    return Judgement(excess, ", ".join(words))


_SIZES = ("very close", "good", "fair")
_NINES = ("near perfect", "excellent", "good")


def _port(pair: Pair, limits: Limits, floor: float) -> Judgement:
    metrics = pair.metrics
    measures = {"max abs": pair.max_abs / limits["max_abs"]}
    if metrics.mae is not None:
        measures["mean abs"] = metrics.mae / limits["mean_abs"]
    if metrics.cosine is not None:
        measures["cosine"] = (1 - metrics.cosine) / (1 - limits["cosine"])
    word, excess = max(measures.items(), key=lambda item: item[1])
    return Judgement(excess, "good" if excess < 1 else f"{word} {excess:.3g}x its limit")


CLASSIC = Preset(
    "classic",
    "MSE and correlation",
    {"mse": 1e-2, "correlation": 0.99},
    _classic,
    needs_values=True,
)
PORT = Preset(
    "port",
    "largest and mean difference, cosine",
    {"max_abs": 0.01, "mean_abs": 0.001, "cosine": 0.99},
    _port,
    needs_values=True,
)
