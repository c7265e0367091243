"""A comparison as tables: a row for each run, for each tensor, for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tensortap_analysis.captured.words import layer_of
from tensortap_analysis.comparison.outcome import RunComparison
from tensortap_analysis.judging.judgement import Judgement
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.rendering import Columns, Row, cell, fitted, rendered

if TYPE_CHECKING:
    from tensortap_analysis.comparison.result import Comparison

_METRICS = (
    "mse", "rmse", "mae", "max_abs", "relative_mse", "relative_mae", "relative_max",
    "relative_mean", "relative_median", "relative_l2", "cosine", "correlation", "sqnr_db",
    "ulp_max", "ulp_mean", "nan_ref", "nan_other", "inf_ref", "inf_other",
    "nonfinite_mismatches", "bitwise_equal",
)  # fmt: skip
_SIDES = ("mean", "std", "min", "max")
_SUMMARY = {
    "run": "run", "mode": "mode", "first_mse": "first layer MSE", "first_mae": "first layer MAE",
    "last_mse": "last layer MSE", "last_mae": "last layer MAE",
    "mean_correlation": "mean correlation", "worst": "worst tensor", "compared": "compared",
    "not_compared": "not compared", "beyond": "beyond", "verdict": "verdict",
}  # fmt: skip
_LEAST_OF_SUMMARY = (
    "first_mae", "last_mae", "mean_correlation", "first_mse", "worst", "last_mse", "mode",
)  # fmt: skip
_TENSORS = {
    "tensor": "tensor", "when": "step", "by": "by", "mse": "MSE", "mae": "MAE",
    "max_abs": "max abs", "error": "relative L2", "cosine": "cosine", "sqnr_db": "SQNR dB",
    "excess": "of limit", "grade": "judged",
}  # fmt: skip
_LEAST_OF_TENSORS = ("by", "mae", "mse", "when", "max_abs", "sqnr_db", "cosine")
_OF_FINITE = ("mse", "mae", "max_abs", "cosine", "sqnr_db")
_NOTHING = 1e-3
"""A share of a layer's error that no module is named for."""
LAYERS = {
    "layer": "layer", "input": "input error", "output": "output error", "added": "added inside",
    "by": "most by", "most": "which added",
}  # fmt: skip


def run_rows(found: Comparison) -> list[Row]:
    """The summary: a row for each run, numbers as numbers."""
    return [_run_row(run) for run in found.runs]


def _run_row(run: RunComparison) -> Row:
    first, last = _ends(run.pairs)
    row: dict[str, Any] = {"run": run.run.path, "mode": run.run.mode or run.run.format}
    for word, pair in (("first", first), ("last", last)):
        row[f"{word}_layer"] = pair.name if pair is not None else None
        row[f"{word}_mse"] = pair.metrics.mse if pair is not None else None
        row[f"{word}_mae"] = pair.metrics.mae if pair is not None else None
    worst = run.worst
    return row | {
        "mean_correlation": _mean_correlation(run.pairs),
        "worst": worst.name if worst is not None else None,
        "compared": len(run.pairs),
        "not_compared": run.not_compared,
        "by_statistics": sum(pair.by == "statistics" for pair in run.pairs),
        "beyond": len(run.divergences),
        "local": len(run.local),
        "jumps": len(run.jumps),
        "abnormal": len(run.abnormal),
        "warnings": len(run.warnings),
        "verdict": run.verdict,
    }


def _ends(pairs: Sequence[Pair]) -> tuple[Pair | None, Pair | None]:
    """The outputs of the first and the last layer; without layers, of what ran first and last.

    A layer that was not captured as a whole is represented by its mixer (older tools did so).
    """
    outputs = [pair for pair in pairs if pair.name.endswith("/forward/output")]
    for kind in ("", ".mixer"):
        layers = [(number, pair) for pair in outputs if (number := _layer(pair, kind)) is not None]
        if layers:
            step = layers[0][1].at.step
            ends = [row for row in layers if row[1].at.step == step]
            return _pick(min, ends), _pick(max, ends)
    return (outputs[0], outputs[-1]) if outputs else (None, None)


def _pick(which: Callable[..., tuple[int, Pair]], layers: list[tuple[int, Pair]]) -> Pair:
    return which(layers, key=lambda row: row[0])[1]


def _layer(pair: Pair, kind: str) -> int | None:
    """The number of the layer that this is the output of, or of its mixer."""
    module = pair.name.partition("/")[0]
    number = layer_of(module)
    return number if number is not None and module.endswith(f"layers.{number}{kind}") else None


def _mean_correlation(pairs: Sequence[Pair]) -> float | None:
    known = [p.metrics.correlation for p in pairs if p.metrics.correlation is not None]
    return math.fsum(known) / len(known) if known else None


def tensor_rows(run: RunComparison, limit: int = 0) -> list[Row]:
    """A row for each tensor with all its metrics, the worst first; at most `limit` of them."""
    both = run.ranked[:limit] if limit else run.ranked
    added = {id(found.pair): found for found in run.divergences}
    return [
        _tensor_row(run.run.path, pair, judgement)
        | {
            key: getattr(added.get(id(pair)), key, None)
            for key in ("origin", "inherited", "local", "basis")
        }
        for pair, judgement in both
    ]


def _tensor_row(path: str, pair: Pair, judgement: Judgement) -> dict[str, Any]:
    metrics, at = pair.metrics, pair.at
    row: dict[str, Any] = {
        "run": path, "tensor": pair.name, "when": at.when.removeprefix("step "),
        "step": at.step, "microbatch": at.microbatch, "call": at.call,
        "eval": at.eval, "recompute": at.recompute, "dp_rank": at.dp_rank,
        "order": pair.order, "by": pair.by, "shape": "x".join(map(str, pair.ref.shape)) or "scalar",
        "ref_dtype": pair.ref.dtype, "run_dtype": pair.other.dtype,
    }  # fmt: skip
    for word, side in (("ref", metrics.ref), ("run", metrics.other), ("d", metrics.difference)):
        row |= {f"{word}_{name}": getattr(side, name) for name in _SIDES}
    row |= {name.replace("_other", "_run"): getattr(metrics, name) for name in _METRICS}
    row |= {f"p{rank}": value for rank, value in metrics.percentiles.items()}
    row["max_abs_at"] = " ".join(map(str, metrics.max_abs_at or ())) or None
    return row | {
        "error": pair.error,
        "noise_error": None if pair.noise is None else pair.noise.error,
        "excess": judgement.excess,
        "grade": judgement.grade,
        "within": judgement.within,
        "decided": judgement.decided,
        "note": pair.note,
    }


def unpaired_rows(run: RunComparison) -> list[Row]:
    """A row for each name that was not compared, with the reason as its grade."""
    return [
        {"run": run.run.path, "tensor": one.name, "by": f"not compared: {one.kind}",
         "grade": one.reason, "within": False, "decided": False, "count": one.count}
        for one in run.unpaired
    ]  # fmt: skip


def summary(found: Comparison, kind: str = "text", *, width: int | None = None) -> str:
    """The summary as `text` (of at most this width), `markdown` or `csv`."""
    return _table(run_rows(found), kind, _SUMMARY, _LEAST_OF_SUMMARY, width)


def tensors(
    run: RunComparison, kind: str = "text", limit: int = 0, *, width: int | None = None
) -> str:
    """The tensors of one run as `text`, `markdown` or `csv`, the worst first.

    In text and Markdown a tensor that is passed on under other names is listed once, and errors
    are left out that NaN or infinity on one side only makes those of the other elements.
    """
    rows = tensor_rows(run)
    if kind != "csv":
        rows = [without_rest(row) for row in _once(rows)]
    return _table(rows[: limit or None], kind, _TENSORS, _LEAST_OF_TENSORS, width)


def without_rest(row: Row) -> Row:
    """A row without what is said of the finite elements alone, where others differ."""
    return {**row, **dict.fromkeys(_OF_FINITE)} if row["nonfinite_mismatches"] else row


def _once(rows: Iterable[Row]) -> list[Row]:
    """Rows of equal numbers at one moment as one, which says how many names there are."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, row in enumerate(rows):
        at = tuple(row[key] for key in ("step", "microbatch", "call", "dp_rank", "recompute"))
        numbers = (row["shape"], row["mse"], row["max_abs"], row["ref_mean"], row["run_mean"])
        key = (*at, *numbers) if row["error"] > 0 and row["mse"] is not None else (number,)
        known = found.setdefault(key, {**row, "names": 0})
        known["names"] += 1
    return [
        row | ({"tensor": f"{row['tensor']} (and {row['names'] - 1} more)"} if many else {})
        for row in found.values()
        for many in [row["names"] > 1]
    ]


def layer_rows(run: RunComparison) -> list[Row]:
    """A row for each layer at each moment: the error that goes in, comes out, and is added."""
    return [
        {
            "layer": row.layer, "step": row.at.step, "microbatch": row.at.microbatch,
            "when": row.at.when, "input": row.input, "output": row.output, "added": row.added,
            "by": row.by, "most": row.most, "measured": row.measured, "least": row.least,
        }
        for row in run.depth
    ]  # fmt: skip


def layers(run: RunComparison, kind: str = "text") -> str:
    """The error by depth at one moment, as `text`, `markdown` or `csv` (of all moments)."""
    return rendered(layer_rows(run) if kind == "csv" else telling_layers(run), kind, LAYERS)


def telling_moment(run: RunComparison) -> str:
    """The first moment at which a layer is beyond its limit, else something is; else the first."""
    listed = {row.at.renamed(""): row.at.when for row in run.depth}
    beyond = [found.pair.at for found in run.divergences]
    within = [at for at in beyond if layer_of(at.name) is not None and "/forward/" in at.name]
    known = (listed.get(at.renamed("")) for at in (*within, *beyond))
    return next((when for when in known if when is not None), run.depth[0].at.when)


def telling_layers(run: RunComparison) -> list[Row]:
    """The rows of the `telling_moment` as people read them."""
    when = telling_moment(run) if run.depth else ""
    return [_spelled(row) for row in layer_rows(run) if row["when"] == when]


def _spelled(row: Row) -> Row:
    """Modules by what follows the layer's name; `~` before an estimate, `≥` before a least."""
    least = "≥" if row["least"] else ""
    about = "" if row["measured"] else "~"
    by = row["by"] and (row["by"].removeprefix(row["layer"]).lstrip(".") or "itself")
    if row["most"] < _NOTHING * (row["output"] or 0.0):
        by = None

    def told(value: float | None, sign: str) -> str:
        known = value is not None and math.isfinite(value) and (value or sign == "~")
        return f"{sign}{cell(value)}" if known else cell(value)

    return {
        **row,
        "input": told(row["input"], least),
        "output": told(row["output"], least),
        "added": told(row["added"], least or about),
        "by": by,
        "most": told(row["most"], least or about) if by else "-",
    }


def _table(
    rows: Sequence[Row], kind: str, columns: Columns, least: Sequence[str], width: int | None
) -> str:
    if kind == "text" and width is not None:
        return fitted(rows, columns, least, width)
    return rendered(rows, kind, columns)
