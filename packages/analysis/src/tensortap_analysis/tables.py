"""A comparison as tables: a row for each run, a row for each tensor; as text, Markdown or CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from tensortap.errors import ConfigError, nearest
from tensortap_analysis.pairs import Pair
from tensortap_analysis.presets import Judgement
from tensortap_analysis.words import layer_of

if TYPE_CHECKING:
    from tensortap_analysis.comparison import Comparison, RunComparison

Row = Mapping[str, Any]
_METRICS = (
    "mse", "rmse", "mae", "max_abs", "relative_mse", "relative_mae", "relative_max",
    "relative_mean", "relative_median", "relative_l2", "cosine", "correlation", "sqnr_db",
    "ulp_max", "ulp_mean", "nonfinite_mismatches", "bitwise_equal",
)  # fmt: skip
_SIDES = ("mean", "std", "min", "max")


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
        "beyond": len(run.divergences),
        "local": len(run.local),
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
    """A row for each tensor with all its metrics; of more than `limit` the worst, in order."""
    both = list(zip(run.pairs, run.judgements, strict=True))
    if limit and len(both) > limit:
        ranked = sorted(both, key=lambda row: (row[1].excess, row[0].error), reverse=True)
        both = sorted(ranked[:limit], key=lambda row: row[0].order)
    return [_tensor_row(run.run.path, pair, judgement) for pair, judgement in both]


def _tensor_row(path: str, pair: Pair, judgement: Judgement) -> Row:
    metrics, at = pair.metrics, pair.at
    row: dict[str, Any] = {
        "run": path, "tensor": pair.name, "step": at.step, "microbatch": at.microbatch,
        "call": at.call, "eval": at.eval, "recompute": at.recompute, "dp_rank": at.dp_rank,
        "by": pair.by, "shape": "x".join(map(str, pair.ref.shape)) or "scalar",
        "ref_dtype": pair.ref.dtype, "run_dtype": pair.other.dtype,
    }  # fmt: skip
    for word, side in (("ref", metrics.ref), ("run", metrics.other), ("d", metrics.difference)):
        row |= {f"{word}_{name}": getattr(side, name) for name in _SIDES}
    row |= {name: getattr(metrics, name) for name in _METRICS}
    row |= {f"p{rank}": value for rank, value in metrics.percentiles.items()}
    row["max_abs_at"] = " ".join(map(str, metrics.max_abs_at or ())) or None
    return row | {
        "error": pair.error,
        "noise_error": None if pair.noise is None else pair.noise.error,
        "excess": judgement.excess,
        "grade": judgement.grade,
        "within": judgement.within,
        "note": pair.note,
    }


def summary(found: Comparison, kind: str = "text") -> str:
    """The summary as `text`, `markdown` or `csv`."""
    rows = run_rows(found)
    columns = {
        "run": "run", "mode": "mode", "first_mse": "first layer MSE", "first_mae": "MAE",
        "last_mse": "last layer MSE", "last_mae": "MAE ", "mean_correlation": "mean correlation",
        "worst": "worst tensor", "beyond": "beyond", "verdict": "verdict",
    }  # fmt: skip
    return rendered(rows, kind, columns)


def tensors(run: RunComparison, kind: str = "text", limit: int = 0) -> str:
    """The tensors of one run as `text`, `markdown` or `csv`."""
    columns = {
        "tensor": "tensor", "step": "step", "by": "by", "mse": "MSE", "mae": "MAE",
        "max_abs": "max abs", "error": "relative L2", "cosine": "cosine", "sqnr_db": "SQNR dB",
        "excess": "of limit", "grade": "judged",
    }  # fmt: skip
    return rendered(tensor_rows(run, limit), kind, columns)


def rendered(rows: Sequence[Row], kind: str, columns: Mapping[str, str]) -> str:
    """Rows as text, Markdown (these columns, under these headings) or CSV (everything)."""
    writers: Mapping[str, Callable[[Sequence[Row], Mapping[str, str]], str]] = {
        "text": _text,
        "markdown": _markdown,
        "csv": _csv,
    }
    if kind not in writers:
        raise ConfigError(f"There is no table {kind!r}; there are {nearest(kind, writers)}.")
    return writers[kind](rows, columns)


def _text(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for key, heading in columns.items():
        numeric = any(_is_number(row.get(key)) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell(row.get(key))) for key in columns))
    console = Console(width=10_000, file=io.StringIO(), color_system=None)
    width = Measurement.get(console, console.options, table).maximum
    plain = Console(width=width, file=io.StringIO(), color_system=None)
    with plain.capture() as captured:
        plain.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def _markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    marks = ["--:" if any(_is_number(row.get(key)) for row in rows) else "---" for key in columns]
    body = [[cell(row.get(key)) for key in columns] for row in rows]
    lines = ([word.strip() for word in line] for line in (columns.values(), marks, *body))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Everything a row has, numbers in full."""
    keys = list(dict.fromkeys(key for row in rows for key in row)) or list(columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if row.get(key) is None else row[key] for key in row} for row in rows)
    return text.getvalue().rstrip("\n")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def cell(value: object) -> str:
    """A value as people read it: four digits, `-` for what is not known."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def block(pair: Pair, judgement: Judgement) -> str:
    """Everything about one tensor, in the lines the older tools printed."""
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
        f"  likeness   correlation {_exact(found.correlation)}, cosine {_exact(found.cosine)}, "
        f"SQNR {cell(found.sqnr_db)} dB, ulp max {cell(found.ulp_max)} mean {cell(found.ulp_mean)}",
        f"  NaN/Inf    REF {found.nan_ref:,}/{found.inf_ref:,}, RUN {found.nan_other:,}/"
        f"{found.inf_other:,}, mismatches {found.nonfinite_mismatches:,}",
        f"  judged     {judgement.grade} ({cell(judgement.excess)} of the limit)",
    ]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g} ({100 * value:.4g} %)"


def _exact(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
