"""What the commands print: lines and tables for people, JSON for scripts, errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tensortap.tables import print_whole

_out = Console(soft_wrap=True)
_err = Console(stderr=True)


def say(text: str = "", style: str | None = None) -> None:
    """A line on stdout, as it is."""
    _out.print(text, style=style, highlight=False, markup=False)


def warn(text: str) -> None:
    """A line on stderr, where a pipe does not swallow it."""
    _err.print(
        f"warning: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True
    )


def say_json(content: Any) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def mark(fine: bool) -> str:
    """A tick or a cross; words where the terminal's encoding has neither."""
    try:
        "✓✗".encode(_out.encoding)
    except (UnicodeEncodeError, LookupError):
        return "ok " if fine else "BAD"
    return "✓" if fine else "✗"


def say_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout, as wide as it must be; columns of numbers to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, heading in enumerate(headings):
        numbers = any(isinstance(row[column], (int, float)) for row in rows)
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row))
    print_whole(table, _out)


def cell(value: object) -> str:
    """A value as people read it: four digits, `-` for what there is none of."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr where somebody watches; call with what is done now, how much of how much."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    hidden = not _err.is_terminal  # A bar that nobody sees leaves an empty line.
    with Progress(*columns, console=_err, transient=True, disable=hidden) as shown:
        task = shown.add_task("", total=None)
        yield lambda what, done, total: shown.update(
            task, description=what, completed=done, total=total
        )
