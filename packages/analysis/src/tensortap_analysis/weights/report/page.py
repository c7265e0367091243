"""`write_scan_report`: a scan in, one HTML file out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tensortap
from tensortap.errors import ConfigError
from tensortap.store.disk import replace_file
from tensortap_analysis.outputs import require_writable
from tensortap_analysis.report.markup import Html, join, listing, tag
from tensortap_analysis.report.searching import Column, searched
from tensortap_analysis.report.shell import document
from tensortap_analysis.weights.health import Health
from tensortap_analysis.weights.report import charts, spread
from tensortap_analysis.weights.report.sections import cards, issue_table, sentence
from tensortap_analysis.weights.report.spread import Histogram
from tensortap_analysis.weights.result import ScanResult

_LINES, _ROWS = 40, 20_000
_KINDS = {"good": "good", "improve": "", "do not deploy": "bad"}
_COLUMNS: tuple[tuple[str, str, str, str], ...] = (
    ("condition", "spectral", "condition_number", "Largest over smallest singular value"),
    ("s_max", "spectral", "s_max", "Spectral norm"),
    ("stable rank", "spectral", "stable_rank", "||W||² / s_max²"),
    ("effective rank", "spectral", "effective_rank", "Exponential of the spectrum's entropy"),
    ("rank 99 %", "spectral", "energy_rank_99", "Directions that hold 99 % of the energy"),
    ("outliers %", "quantization", "extreme_outlier_percentage", "Beyond 3 standard deviations"),
    ("max/rms", "quantization", "dynamic_range_rms", "Largest magnitude over root mean square"),
    ("kurtosis", "quantization", "kurtosis", "3 for a normal distribution"),
    ("int8 dB", "quantization", "sqnr_db", "SQNR of int8 with one scale"),
    ("per channel", "quantization", "sqnr_db_per_channel", "SQNR of int8 with a scale a row"),
    ("zeros", "sparsity", "zeros", "Values that are exactly 0"),
    ("dead rows", "sparsity", "dead_rows", "Rows that are all 0"),
    ("copied rows", "sparsity", "duplicated_rows", "Rows that equal another one"),
    ("l2", "norms", "l2", "Frobenius norm"),
    ("max", "norms", "max", "Largest magnitude"),
    ("NaN", "norms", "nan", "Values that are not a number"),
)
"""Heading, method, metric, and what the heading means."""


def write_scan_report(
    out: str | os.PathLike[str],
    result: ScanResult,
    found: Health,
    values: Sequence[Histogram] = (),
) -> Path:
    """Write one self-contained HTML file; it opens offline, in any browser.

    `values` are the histograms of layers whose weights are at hand. An existing file is replaced
    once the new one is whole. Raises `ConfigError` for a name that cannot be written.
    """
    path = target(out)
    sections = {
        "summary": ("Summary", _summary(result, found)),
        "issues": ("Issues", _issues(found)),
        "charts": ("Charts", join(one.markup() for one in charts.charts(result))),
        "values": ("Values", join(one.markup() for one in spread.charts(values))),
        "layers": ("Layers", _layers(result)),
        "left-out": ("Left out", _left_out(result)),
    }
    shown = {key: value for key, value in sections.items() if value[1]}
    about = f"Weights of {result.source}; tensortap {tensortap.__version__}"
    replace_file(path, document(result.source, about, shown).encode(), sync=False)
    return path


def target(out: str | os.PathLike[str]) -> Path:
    """Where to write; raises `ConfigError`, before any work is done."""
    path = Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--html {path}: a report is an HTML file; name it ….html.")
    require_writable(path, "--html")
    return path


def _summary(result: ScanResult, found: Health) -> Html:
    counts = {severity: len(issues) for severity, issues in found.issues.items()}
    facts = [
        (f"{found.score:.0f} of 100", f"{found.verdict} ({found.preset})", _KINDS[found.verdict]),
        *((f"{count:,}", word, "bad" if word == "critical" and count else "")
          for word, count in counts.items()),
        (f"{len(result):,}", "matrices", ""),
        (f"{len(result.vectors):,}", "vectors", ""),
        (f"{result.parameters:,}", "values", ""),
    ]  # fmt: skip
    notices = [*result.notes, *found.unjudged]
    if found.unmeasured:
        notices.append(f"Not measured, and so not judged: {', '.join(found.unmeasured)}.")
    if found.unresolved:
        notices.append(
            f"The dtype cannot resolve the condition numbers of {found.unresolved:,} of "
            f"{found.layers:,} layers."
        )
    parts: list[str] = [cards(facts)]
    if notices:
        parts.append(tag("div", tag("h3", "Notes"), listing(notices, _LINES), class_="notice"))
    return join(parts)


def _issues(found: Health) -> Html:
    issues = found.at_least("info")
    return issue_table(issues) if issues else tag("p", "Nothing is wrong, by these rules.")


def _layers(result: ScanResult) -> Html:
    measured = [column for column in _COLUMNS if column[1] in result.methods]
    columns: list[Column] = [
        ("layer", "layer", "The module's path"),
        ("shape", "shape", "As stored"),
        ("dtype", "dtype", "As stored"),
        *((metric, heading, says) for heading, _, metric, says in measured),
    ]
    rows = [_row(layer, result, measured) for layer in islice(result, _ROWS)]
    cut = f" The first {_ROWS:,} of {len(result):,}." if len(result) > _ROWS else ""
    says = f"In the order of the checkpoint; a click on a heading sorts.{cut}"
    return join((
        tag("p", says, class_="says"),
        searched(columns, rows, ""),
    ))  # fmt: skip


def _row(
    layer: str, result: ScanResult, measured: Sequence[tuple[str, str, str, str]]
) -> Mapping[str, Any]:
    facts, stats = result.facts[layer], result[layer]
    metrics = {metric: stats[method].get(metric) for _, method, metric, _ in measured}
    shape = " x ".join(map(str, facts.shape))
    return {"layer": layer, "shape": shape, "dtype": facts.dtype, **metrics}


def _left_out(result: ScanResult) -> Html:
    return listing(map(sentence, result.skipped), _LINES, "more, in the saved scan")
