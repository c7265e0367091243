"""A comparison of modes in the words and rows of the older tools."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tensortap.records import encode_float
from tensortap_hf.command.printing import cell

if TYPE_CHECKING:
    from tensortap_analysis import Comparison, Judgement, Pair

_KINDS = {
    "layer": (
        re.compile(r"(?:.*\.)?layers\.(\d+)/forward/output"),
        "layer outputs (with residual)",
    ),
    "mixer": (
        re.compile(r"(?:.*\.)?layers\.(\d+)\.mixer/forward/output"),
        "mixer outputs (what the older scripts called a layer)",
    ),
}
_HEADINGS = (
    "mode", "reference", "first MSE", "first MAE", "last MSE", "last MAE", "mean correlation",
    "last layer is",
)  # fmt: skip


def details(found: Comparison) -> Iterator[str]:
    """Lines on each tensor of the one run of a comparison, in execution order."""
    run = found.runs[0]
    for pair, judgement in zip(run.pairs, run.judgements, strict=True):
        yield from _block(pair, judgement)


def _block(pair: Pair, judgement: Judgement) -> Iterator[str]:
    m, note = pair.metrics, f" ({pair.note})" if pair.note else ""
    yield f"  {pair.name} {list(pair.ref.shape)}{note}"
    for word, side in (("reference", m.ref), ("mode", m.other)):
        yield (
            f"    {word:<12}mean {cell(side.mean)}, std {cell(side.std)}, "
            f"range [{cell(side.min)}, {cell(side.max)}]"
        )
    ranks = ", ".join(f"{rank}%: {cell(value)}" for rank, value in m.percentiles.items())
    yield f"    difference  mean {cell(m.difference.mean)}, std {cell(m.difference.std)}"
    yield f"    |d|         mean {cell(m.mae)}, max {cell(m.max_abs)}; {ranks or '-'}"
    yield (
        f"    errors      MSE {cell(m.mse)}, RMSE {cell(m.rmse)}, MAE {cell(m.mae)}; relative "
        f"MSE {_percent(m.relative_mse)}, MAE {_percent(m.relative_mae)}"
    )
    correlation = "-" if m.correlation is None else f"{m.correlation:.8f}"
    yield f"    correlation {correlation}; {judgement.grade}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ({100 * value:.4g} %)"


def tables(
    results: Sequence[tuple[str, str, Comparison]],
) -> Iterator[tuple[str, Sequence[str], list[Sequence[object]]]]:
    """(title, headings, rows) of the summary: one table for layers, one for their mixers."""
    for kind, (_, title) in _KINDS.items():
        rows: list[Sequence[object]] = []
        for mode, ref, found in results:
            row = _row(found, kind)
            if row is not None:
                correlation = row["mean_correlation"]
                told = None if correlation is None else f"{correlation:.6f}"
                rows.append((mode, ref, *{**row, "mean_correlation": told}.values()))
        if rows:
            yield title, _HEADINGS, rows


def rows_json(found: Comparison) -> dict[str, Any]:
    """The same rows as plain JSON: `{"layer": {...}, "mixer": {...}}`."""
    return {kind: _plain(_row(found, kind)) for kind in _KINDS}


def _plain(row: dict[str, Any] | None) -> dict[str, Any] | None:
    """JSON has no infinities: they become strings."""
    if row is None:
        return None
    return {key: encode_float(x) if isinstance(x, float) else x for key, x in row.items()}


def _row(found: Comparison, kind: str) -> dict[str, Any] | None:
    """First and last layer, and the mean correlation of all; `None` where there are none."""
    pattern, run = _KINDS[kind][0], found.runs[0]
    layers = [
        (int(match[1]), pair, judgement)
        for pair, judgement in zip(run.pairs, run.judgements, strict=True)
        if (match := pattern.fullmatch(pair.name)) is not None
    ]
    if not layers:
        return None
    first, last = min(layers, key=lambda one: one[0]), max(layers, key=lambda one: one[0])
    known = [c for _, pair, _ in layers if (c := pair.metrics.correlation) is not None]
    return {
        "first_mse": first[1].metrics.mse,
        "first_mae": first[1].metrics.mae,
        "last_mse": last[1].metrics.mse,
        "last_mae": last[1].metrics.mae,
        "mean_correlation": math.fsum(known) / len(known) if known else None,
        "grade": last[2].grade,
    }
