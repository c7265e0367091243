"""The table of tensors: its rows as data, which the page sorts, searches and shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tensortap_analysis.comparison.result import Comparison
from tensortap_analysis.comparison.tables import tensor_rows, without_rest
from tensortap_analysis.rendering import Row
from tensortap_analysis.report.markup import Html, join, tag
from tensortap_analysis.report.searching import Column, searched
from tensortap_analysis.report.views import View

_COMPARED: tuple[Column, ...] = (
    ("tensor", "tensor", "Canonical name"),
    ("run", "run", "The run compared with the reference"),
    ("step", "step", "Training or inference step"),
    ("when", "moment", "Microbatch, call, evaluation or recomputation, where not the first"),
    ("excess", "of limit", "Error in units of its limit: beyond from 1 on"),
    ("error", "relative L2", "|run - ref| / |ref|; of statistics, at least"),
    ("grade", "judged", "The judgement in words"),
    (
        "origin",
        "origin",
        "Beyond its limit: was the error added here (local), inherited, or unknown?",
    ),
    ("max_abs", "max abs", "Largest difference"),
    ("mae", "MAE", "Mean absolute difference"),
    ("cosine", "cosine", "Cosine similarity"),
    ("sqnr_db", "SQNR dB", "Signal to quantisation noise ratio"),
    ("nonfinite_mismatches", "NaN/Inf", "Values that are NaN or infinite on one side only"),
    ("by", "by", "Compared by values, a sample of them, or statistics"),
    ("shape", "shape", "Shape in the reference"),
    ("dtypes", "dtype", "Of the reference, and of the run where it differs"),
    ("ref_std", "ref std", "Standard deviation in the reference"),
    ("run_std", "run std", "Standard deviation in the run"),
)
_CAPTURED: tuple[Column, ...] = (
    ("tensor", "tensor", "Canonical name"),
    ("step", "step", "Training or inference step"),
    ("dtype", "dtype", "As captured"),
    ("count", "values", "Of all ranks, microbatches and calls"),
    ("nan", "NaN", "Values that are not a number"),
    ("inf", "Inf", "Infinite values"),
    ("zero", "zero", "Share of zeros"),
    ("mean", "mean", "Of the finite values"),
    ("std", "std", "Population standard deviation of the finite values"),
    ("rms", "RMS", "Root mean square of the finite values"),
    ("absmax", "absmax", "Largest magnitude"),
    ("outlier", "outlier", "max |x - mean| / std: how far the farthest value stands out"),
)


@dataclass(frozen=True, slots=True)
class Listing:
    """The section, how many tensors there are, and how many of them it lists."""

    html: Html
    tensors: int
    listed: int


def section(views: Sequence[View], found: Comparison | None, rows: int) -> Listing:
    """The worst `rows` tensors of the comparison, or of the one run."""
    if found is not None:
        labels = {one.path: one.label for one in views}
        columns, total, picked = _COMPARED, *_compared(found, labels, rows)
        idle = {"run"} if len(found.runs) == 1 else set()
        idle |= set() if any(row["when"] for row in picked) else {"when"}
        columns = tuple(column for column in columns if column[0] not in idle)
        full, first = "tensortap compare --csv --details", "error over its limit"
    else:
        columns, total, picked = _CAPTURED, *_captured(views[0], rows)
        full, first = "tensortap show --limit 0", "NaN and Inf, then max |x - mean| / std"
    cut = f"The worst {len(picked):,} of {total:,}; {full} has all." if total > len(picked) else ""
    ordered = f"Worst first, by {first}. {cut}"
    html = join((tag("p", ordered, class_="says"), searched(columns, picked, "excess")))
    return Listing(html, total, len(picked))


def _compared(found: Comparison, labels: dict[str, str], rows: int) -> tuple[int, list[Row]]:
    """All runs' tensors in one table, the farthest beyond their limits first."""
    picked: list[Row] = [
        {
            **without_rest(row),
            "run": labels.get(row["run"], row["run"]),
            "when": row["when"].removeprefix(str(row["step"])).strip(),
            "dtypes": _dtypes(row),
        }
        for run in found.runs
        for row in tensor_rows(run, rows)
    ]
    picked.sort(key=lambda row: (row["excess"], row["error"]), reverse=True)
    return sum(len(run.pairs) for run in found.runs), picked[:rows]


def _dtypes(row: Row) -> str:
    one, two = row["ref_dtype"], row["run_dtype"]
    return one if one == two else f"{one} → {two}"


def _captured(view: View, rows: int) -> tuple[int, list[Row]]:
    found = view.survey
    if found is None:
        return 0, []
    outliers = found.outliers
    order = sorted(
        range(len(found.name)),
        key=lambda at: (found.nonfinite[at], _known(float(outliers[at]))),
        reverse=True,
    )
    picked: list[Row] = []
    for at in order[:rows]:
        number = int(found.name[at])
        name = found.names[number]
        count, nan = int(found.count[at]), int(found.nan[at])
        picked.append({
            "tensor": name, "step": found.steps[int(found.step[at])],
            "dtype": found.dtypes[number], "count": count, "nan": nan,
            "inf": int(found.nonfinite[at]) - nan,
            "zero": int(found.zero[at]) / count if count else None,
            "outlier": float(outliers[at]),
            **{key: float(getattr(found, key)[at]) for key in ("mean", "std", "rms", "absmax")},
        })  # fmt: skip
    return len(found.name), picked


def _known(value: float) -> float:
    return value if value == value else -1.0
