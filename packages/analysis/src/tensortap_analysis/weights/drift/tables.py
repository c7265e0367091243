"""Drift as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.table import Table

from tensortap_analysis.weights.command.tables import general, issue_line, shown
from tensortap_analysis.weights.drift.alerts import together
from tensortap_analysis.weights.drift.tracking import Drift
from tensortap_analysis.weights.drift.trend import checkpoint_names, layers_of, most_changed
from tensortap_analysis.weights.health import Issue

_TIMES = 10.0


def _percent(value: float) -> str:
    """Shares; what is ten times as much as before and more, as times."""
    if value >= _TIMES:
        return f"{value:,.0f}x"
    return f"{value:.3%}" if value < 0.1 else f"{value:.1%}"


_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("change", "relative_change", _percent),
    ("norm ratio", "l2_norm_ratio", lambda value: f"{value:.5g}"),
    ("cosine", "cosine", lambda value: f"{value:.6f}"),
    ("spectral ratio", "spectral_norm_ratio", lambda value: f"{value:.5g}"),
    ("condition x", "condition_growth", general),
    ("row most", "row_change_max", _percent),
    ("unchanged", "unchanged", _percent),
)


def change_table(drift: Drift, limit: int) -> Table:
    """A row for each weight, the most changed first; `~` marks what is unresolved."""
    table = _table(("layer", "shape"))
    ranked = most_changed([drift], list(drift.layers))[: limit or None]
    rows = [(layer, drift.layers[layer]) for layer in ranked]
    there = [one for one in _COLUMNS if any(one[1] in row for _, row in rows)]
    for heading, *_ in there:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, row in rows:
        cells = [_cell(row, metric, show) for _, metric, show in there]
        table.add_row(shown(layer), "x".join(map(str, row["shape"])), *cells)
    return table


def trend_table(steps: Sequence[Drift], limit: int) -> Table:
    """The relative change of each weight at each step, and its norm at the end over the first.

    The most changed comes first.
    """
    table = _table(("layer",))
    for name in checkpoint_names(steps)[1:]:
        table.add_column(f"change to {shown(name)}", justify="right", no_wrap=True)
    table.add_column("norm, last / first", justify="right", no_wrap=True)
    layers = most_changed(steps, layers_of(steps))
    for layer in layers[: limit or None]:
        rows = [step.layers.get(layer, {}) for step in steps]
        cells = [_cell(row, "relative_change", _percent) for row in rows]
        table.add_row(shown(layer), *cells, _norm_in_all([row for row in rows if row]))
    return table


def _table(headings: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _norm_in_all(rows: Sequence[Any]) -> str:
    first, last = rows[0]["l2_before"], rows[-1]["l2_after"]
    return "-" if not first or last is None else f"{last / first:.5g}"


def _cell(row: Any, metric: str, show: Callable[[Any], str]) -> str:
    value = row.get(metric)
    if value is None:
        return "-"
    if value == math.inf:
        return "inf" if row["l2_before"] else "from 0"
    return f"{show(value)}{'~' if metric in row.get('unresolved', {}) else ''}"


def alert_lines(issues: Sequence[Issue], limit: int) -> Iterator[str]:
    """The worst first, with cause and remedy; rich markup."""
    lines = [issue_line(issue, others) for issue, others in together(issues)]
    yield from lines[: limit or None]
    if limit and len(lines) > limit:
        yield f"  … and {len(lines) - limit:,} more: raise --limit."
