"""Rows as tables: text for a terminal, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from tensortap.errors import ConfigError, nearest

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""Key of a row -> heading, the most important first."""
_LIKENESSES = ("cosine", "correlation", "mean_correlation")


def rendered(rows: Sequence[Row], kind: str, columns: Columns) -> str:
    """Rows as text, Markdown (these columns, under these headings) or CSV (everything)."""
    writers: Mapping[str, Callable[[Sequence[Row], Columns], str]] = {
        "text": _text,
        "markdown": _markdown,
        "csv": _csv,
    }
    if kind not in writers:
        raise ConfigError(f"There is no table {kind!r}; there are {nearest(kind, writers)}.")
    return writers[kind](rows, columns)


def fitted(rows: Sequence[Row], columns: Columns, least: Sequence[str], width: int) -> str:
    """Text of at most this width: columns of `least` are left out, the first ones first."""
    left = [key for key in least if key in columns]
    out: list[str] = []
    text = _text(rows, columns)
    while left and max(map(len, text.splitlines())) > width:
        out.append(columns[left.pop(0)])
        text = _text(rows, {k: v for k, v in columns.items() if v not in out})
    if out:
        text += f"\n(no room for: {', '.join(out)})"
    return text


def _text(rows: Sequence[Row], columns: Columns) -> str:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for key, heading in columns.items():
        numeric = any(_is_number(row.get(key)) for row in rows)
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(_one_line(_shown(row, key))) for key in columns))
    console = Console(width=10_000, file=io.StringIO(), color_system=None)
    width = Measurement.get(console, console.options, table).maximum
    plain = Console(width=width, file=io.StringIO(), color_system=None)
    with plain.capture() as captured:
        plain.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def _markdown(rows: Sequence[Row], columns: Columns) -> str:
    marks = ["--:" if any(_is_number(row.get(key)) for row in rows) else "---" for key in columns]
    body = [[as_markdown(_shown(row, key)) for key in columns] for row in rows]
    lines = ([word.strip() for word in line] for line in (columns.values(), marks, *body))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_markdown(text: str) -> str:
    """On one line, and without what would end a cell."""
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")


def _csv(rows: Sequence[Row], columns: Columns) -> str:
    """Everything a row has, numbers in full."""
    keys = list(dict.fromkeys(key for row in rows for key in row)) or list(columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if row.get(key) is None else row[key] for key in row} for row in rows)
    return text.getvalue().rstrip("\n")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(row: Row, key: str) -> str:
    value = row.get(key)
    return likeness(value) if key in _LIKENESSES else cell(value)


def cell(value: object) -> str:
    """A value as people read it: four digits, `-` for what is not known."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def likeness(value: float | None) -> str:
    """A coefficient up to 1, which is only called 1 where it is."""
    if value is None:
        return "-"
    text = f"{value:.6f}"
    return f"1-{1 - value:.1e}" if text == "1.000000" and value != 1 else text
