"""Records and reports as text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from tensortap.records import TensorRecord


def record_table(records: Iterable[TensorRecord]) -> Table:
    """A row for each record: coordinates, shape and the statistics that tell most."""
    table = Table(box=None, header_style="bold")
    for heading in ("tensor", "step", "shape", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("mean", "std", "absmax", "NaN", "Inf"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        table.add_row(*_cells(record))
    return table


def print_whole(table: Table, console: Console) -> None:
    """Print a table as wide as it is: a terminal may wrap a line, but no number is ever cut."""
    options = console.options.update(max_width=10_000)
    width = Measurement.get(console, options, table).maximum
    Console(width=max(width, console.width)).print(table)


def _cells(record: TensorRecord) -> list[str]:
    stats = record.stats
    shape = "x".join(map(str, record.shape)) or "scalar"
    cells = [escape(str(record.name)), spelled_moment(record), shape, record.dtype]
    if stats is None:
        return [*cells, "-", "-", "-", "-", "-"]
    numbers = [_number(value) for value in (stats.mean, stats.std, stats.absmax)]
    return [*cells, *numbers, _count(stats.nan), _count(stats.posinf + stats.neginf)]


def spelled_moment(record: TensorRecord) -> str:
    """`3`, `3 mb1 call2 eval`: the step, and of the other coordinates those that are not 0."""
    at = record.at
    numbered = (("mb", at.microbatch), ("call", at.call), ("rank", at.rank))
    words = [str(at.step), *(f"{word}{number}" for word, number in numbered if number)]
    marked = (("eval", at.eval), ("recompute", at.recompute))
    return " ".join([*words, *(word for word, marks in marked if marks)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _count(value: int) -> str:
    return f"[red]{value:,}[/]" if value else "0"


def by_reason(lines: Iterable[str]) -> Iterator[str]:
    """Lines `name: reason` as one for each reason: `a.pt and 3 more: it is damaged`."""
    groups: dict[str, list[str]] = {}
    for name, _, reason in (line.partition(": ") for line in lines):
        groups.setdefault(reason, []).append(name)
    for reason, names in groups.items():
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: {reason}"


def grouped(rows: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    """One line for what happened alike in many layers: `layers.*.attn.core (32 names): …`."""
    groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for name, reason, count in rows:
        pattern = re.sub(r"\.\d+(?=[./]|$)", ".*", name)
        groups.setdefault((pattern, reason), []).append((name, count))
    for (pattern, reason), members in groups.items():
        times = sum(count for _, count in members)
        several = f" ({len(members)} names)" if len(members) > 1 else ""
        often = f" ({times}x)" if times > len(members) else ""
        yield f"{pattern if several else members[0][0]}{several}: {reason}{often}"
