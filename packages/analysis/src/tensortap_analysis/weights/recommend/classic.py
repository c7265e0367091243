"""The recommendations of the older guide, by its thresholds: comparable with those of before.

What it gets wrong: int8 is judged with one scale for the whole tensor, which even a perfect normal
matrix of 4096 x 4096 fails (37.8 dB); and a small stable rank does not say that a matrix can be
compressed, so each suggestion also has the error that its rank really leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tensortap_analysis.weights.recommend.compressing import ERROR

Layers = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Layer to `{method: {metric: value}}`: a `ScanResult` or the like."""

_INT8, _INT16 = (0.1, 40.0), (1.0, 30.0)
"""Below this percentage of outliers and above this SQNR in dB."""
_STEPS = ((0.1, "LoRA", 4, 95), (0.2, "LoRA", 8, 90), (0.5, "low-rank", 32, 50))
"""Below this stable rank over total rank: method, rank, and the percentage said to be saved."""


def generate_quant_config(results: Layers) -> dict[str, list[str]]:
    """`int8_layers`, `int16_layers` and `fp16_layers`, by outliers and the SQNR of int8 per tensor.

    A layer without these metrics (NaN, all zeros, not measured) stays in fp16.
    """
    found: dict[str, list[str]] = {"int8_layers": [], "int16_layers": [], "fp16_layers": []}
    for layer, stats in results.items():
        metrics = stats.get("quantization", {})
        outliers, sqnr = metrics.get("extreme_outlier_percentage"), metrics.get("sqnr_db")
        found[_width(outliers, sqnr)].append(layer)
    return found


def _width(outliers: float | None, sqnr: float | None) -> str:
    if outliers is None or sqnr is None:
        return "fp16_layers"
    for name, (most, least) in (("int8_layers", _INT8), ("int16_layers", _INT16)):
        if outliers < most and sqnr > least:
            return name
    return "fp16_layers"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """`saving` is what the guide promised, in percent; `error` what the rank leaves of ||W||."""

    layer: str
    method: str
    rank: int
    saving: int
    ratio: float
    error: float | None


def suggest_compression(results: Layers, *, most: float = ERROR) -> list[Suggestion]:
    """LoRA or a low rank for layers with a small stable rank, the smallest ratio first.

    Left out are those whose rank leaves an error beyond `most`, a share of ||W||: the guide did not
    look at it, and suggests rank 4 where that loses three quarters of a healthy matrix. With
    `most=math.inf` its suggestions are as they were.
    """
    found = (one for one in _suggestions(results) if one.error is None or one.error <= most)
    return sorted(found, key=lambda one: one.ratio)


def _suggestions(results: Layers) -> Iterator[Suggestion]:
    for layer, stats in results.items():
        metrics = stats.get("spectral", {})
        stable, total = metrics.get("stable_rank"), metrics.get("total_rank")
        if stable is None or not total:
            continue
        for limit, method, rank, saving in _STEPS:
            if stable / total < limit:
                error = metrics.get("rank_errors", {}).get(str(rank))
                yield Suggestion(layer, method, rank, saving, stable / total, error)
                break
