"""Everything about one tensor, in the lines the older tools printed."""

from __future__ import annotations

from tensortap_analysis.judging.judgement import Judgement
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.rendering import cell, likeness


def block(pair: Pair, judgement: Judgement) -> str:
    """Both sides and the difference, its errors and percentiles, and how it is judged."""
    found, lines = pair.metrics, [f"{pair.name} ({pair.at.when}), by {pair.by}"]
    for who, side in (("REF", found.ref), ("RUN", found.other), ("difference", found.difference)):
        lines.append(
            f"  {who:<11}mean {cell(side.mean)}, std {cell(side.std)}, "
            f"range [{cell(side.min)}, {cell(side.max)}]"
        )
    place = f" at {list(found.max_abs_at)}" if found.max_abs_at is not None else ""
    ranks = ", ".join(f"{rank}%: {cell(value)}" for rank, value in found.percentiles.items())
    lines += [
        f"  |d|        mean {cell(found.mae)}, max {cell(found.max_abs)}{place}; {ranks or '-'}",
        f"  errors     MSE {cell(found.mse)}, RMSE {cell(found.rmse)}, MAE {cell(found.mae)}, "
        f"relative MSE {_percent(found.relative_mse)}, MAE {_percent(found.relative_mae)}",
        f"  relative   L2 {cell(pair.error)}; element by element max {cell(found.relative_max)}, "
        f"mean {cell(found.relative_mean)}, median {cell(found.relative_median)}",
        f"  likeness   correlation {likeness(found.correlation)}, cosine {likeness(found.cosine)}, "
        f"SQNR {cell(found.sqnr_db)} dB, ulp max {cell(found.ulp_max)} mean {cell(found.ulp_mean)}",
        f"  NaN/Inf    REF {found.nan_ref:,}/{found.inf_ref:,}, RUN {found.nan_other:,}/"
        f"{found.inf_other:,}, mismatches {found.nonfinite_mismatches:,}",
        f"  judged     {judgement.grade} ({cell(judgement.excess)} of the limit)",
    ]
    if pair.note:
        lines.append(f"  note       {pair.note}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ({100 * value:.4g} %)"
