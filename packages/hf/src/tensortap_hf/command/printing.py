"""What the commands print: tables for people, JSON for scripts, progress on stderr."""

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


def say(text: str = "") -> None:
    """A line on stdout, as it is."""
    _out.print(text, highlight=False, markup=False)


def say_if(text: str | None) -> None:
    """The same for a line that may not be there."""
    if text is not None:
        say(text)


def warn(text: str) -> None:
    """A line on stderr, where a pipe does not swallow it."""
    _err.print(
        f"warning: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True
    )


def complain(text: str) -> None:
    """An error on stderr."""
    _err.print(f"error: {text}", style="red", highlight=False, markup=False, soft_wrap=True)


def say_json(content: Any) -> None:
    """JSON on stdout."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def say_table(headings: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """A table on stdout, as wide as it must be; columns of numbers to the right."""
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=title or None, title_justify="left",
        title_style="bold",
    )  # fmt: skip
    for place, heading in enumerate(headings):
        numbers = any(isinstance(row[place], (int, float)) for row in rows)
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell(value)) for value in row))
    print_whole(table, _out)


def count(number: int, word: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def cell(value: object) -> str:
    """A value as people read it: six digits, `-` for what there is none of."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def progress_of(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; call what it gives before each of `total` pieces of work."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task(what, total=total)
        begun = False

        def advance(description: str) -> None:
            nonlocal begun
            progress.update(task, description=description, advance=1 if begun else 0)
            begun = True

        yield advance
