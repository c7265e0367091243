"""Scans and their health as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from tensortap_analysis.weights.health import Health, Issue
from tensortap_analysis.weights.result import Facts, ScanResult
from tensortap_analysis.weights.saved import Metrics
from tensortap_analysis.weights.sources import Skipped

_Column = tuple[str, str, str, Callable[[float], str]]
_FEW = 5


def general(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:.3g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _tenths(value: float) -> str:
    return f"{value:.1f}"


_COLUMNS: tuple[_Column, ...] = (
    ("condition", "spectral", "condition_number", general),
    ("s_max", "spectral", "s_max", general),
    ("stable rank", "spectral", "stable_rank", _tenths),
    ("rank 99 %", "spectral", "energy_rank_99", _whole),
    ("> 3 sigma %", "quantization", "extreme_outlier_percentage", general),
    ("max/rms", "quantization", "dynamic_range_rms", _tenths),
    ("int8 dB", "quantization", "sqnr_db", _tenths),
    ("per channel", "quantization", "sqnr_db_per_channel", _tenths),
    ("zeros", "sparsity", "zeros", _whole),
    ("dead rows", "sparsity", "dead_rows", _whole),
    ("l2", "norms", "l2", general),
    ("max", "norms", "max", general),
)
_COLOURS = {"critical": "red", "warning": "yellow", "info": "cyan"}


def layer_table(result: ScanResult, limit: int) -> Table:
    """A row for each matrix, in the order of the checkpoint; `~` marks what is unresolved."""
    columns = [column for column in _COLUMNS if column[1] in result.methods]
    table = Table(box=None, header_style="bold")
    for heading in ("layer", "shape", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, stats in list(result.items())[: limit or None]:
        cells = [_cell(stats[method], metric, show) for _, method, metric, show in columns]
        table.add_row(*_what(layer, result.facts[layer]), *cells)
    return table


def _what(layer: str, facts: Facts) -> tuple[str, str, str]:
    shape = "x".join(map(str, facts.shape))
    return shown(layer), shape, escape(facts.dtype)


def _cell(metrics: Metrics, metric: str, show: Callable[[float], str]) -> str:
    value = metrics.get(metric)
    if value is None:
        return "-"
    return f"{show(value)}{'~' if metric in metrics['unresolved'] else ''}"


def counted(number: int, one: str, many: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {one if number == 1 else many}"


def shown(name: str) -> str:
    """A name from a file, with nothing in it that a terminal would obey."""
    return escape(name if name.isprintable() else ascii(name))


def health_lines(found: Health, limit: int = _FEW) -> Iterator[str]:
    """Score, counts, and the worst issues of each severity with cause and remedy; rich markup."""
    counts = ", ".join(f"{len(issues):,} {one}" for one, issues in found.issues.items())
    yield f"[bold]score {found.score:.0f} of 100: {found.verdict}[/]  ({counts}; {found.preset})"
    for severity, issues in found.issues.items():
        for issue in issues[: limit or None]:
            yield issue_line(issue)
        if limit and len(issues) > limit:
            yield f"  … and {len(issues) - limit:,} more of {severity}: raise --limit."
    if found.unmeasured:
        yield f"[yellow]Not judged, for it was not measured: {', '.join(found.unmeasured)}.[/]"
    for sentence in found.unjudged:
        yield f"[dim]{shown(sentence)}[/]"
    if found.unresolved:
        yield (
            f"[dim]The dtype cannot resolve the condition numbers of {found.unresolved:,} of "
            f"{found.layers:,} layers (~); the default rules do not judge those.[/]"
        )


def issue_line(issue: Issue, others: int = 0) -> str:
    """One issue, of so many `others` too; rich markup."""
    more = f" and {others:,} more" if others else ""
    where = f"[{_COLOURS[issue.severity]}]{issue.severity}[/] [bold]{shown(issue.layer)}[/]{more}"
    return f"  {where} {escape(issue.cause)} [dim]{escape(issue.remedy)}[/]"


def skipped_lines(skipped: Iterable[Skipped]) -> Iterator[str]:
    """One line a reason, with how many it holds for."""
    reasons: dict[str, list[Skipped]] = {}
    for one in skipped:
        method = f"{one.method}: " if one.method else ""
        reasons.setdefault(f"{method}{_general(one.reason)}", []).append(one)
    for reason, members in reasons.items():
        more = f" and {len(members) - 1:,} more" if len(members) > 1 else ""
        yield f"left out: {shown(members[0].name)}{more}: {shown(reason)}"


def _general(reason: str) -> str:
    """`belongs to X` is one reason, whatever X is."""
    return "belongs to quantised codes" if reason.startswith("belongs to ") else reason


def document(result: ScanResult, found: Health) -> Mapping[str, Any]:
    """What `--json` prints: the report, and its health."""
    return {**result.to_json(), "health": found.to_json()}
