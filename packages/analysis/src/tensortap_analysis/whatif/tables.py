"""What formats do to tensors, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tensortap import formats as known
from tensortap.tables import by_reason, print_whole
from tensortap_analysis.whatif.judging import Expected, WhatIf


@dataclass(frozen=True, slots=True)
class Judged:
    """Rows of one tensor by format; `others` are names under which the same values pass."""

    name: str
    rows: dict[str, Expected]
    others: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The lowest SQNR; infinite where all values are 0."""
        return min(map(_rank, self.rows.values()))

    def needed(self, threshold_db: float) -> str | None:
        """The format of the fewest stored bits, then the highest SQNR, that reaches it."""
        enough = [row for row in self.rows.values() if _rank(row) >= threshold_db]
        if not enough:
            return None
        return min(enough, key=lambda row: (bits_of(row.format), -_rank(row))).format


def by_tensor(found: WhatIf) -> list[Judged]:
    """The tensor whose worst SQNR is lowest comes first."""
    groups: dict[tuple[str, str], dict[str, Expected]] = {}
    for row in found.rows:
        groups.setdefault((row.name, row.basis), {})[row.format] = row
    judged = (Judged(name, rows) for (name, _), rows in groups.items())
    return sorted(judged, key=lambda one: one.worst)


def _distinct(judged: Sequence[Judged]) -> list[Judged]:
    """A layer's output is the next one's input: equal numbers throughout are one tensor."""
    alike: dict[tuple[Expected, ...], list[Judged]] = {}
    for one in judged:
        key = tuple(replace(row, name="") for row in one.rows.values())
        alike.setdefault(key, []).append(one)
    return [
        replace(first, others=tuple(other.name for other in others))
        for first, *others in alike.values()
    ]


def _rank(row: Expected) -> float:
    return float("inf") if row.sqnr_db is None else row.sqnr_db


def bits_of(name: str) -> float:
    """Bits that a value takes, with its share of the scales."""
    return {row.name: row.bits_stored for row in known.table()}[name]


def show(found: WhatIf, wanted: Sequence[str], threshold_db: float, limit: int) -> None:
    """Print at most `limit` tensors, then what could not be judged."""
    console = Console(soft_wrap=True)
    table = Table(box=None, header_style="bold")
    table.add_column("tensor", no_wrap=True)
    for name in wanted:
        table.add_column(f"{name}\n{bits_of(name):g} bit", justify="right", no_wrap=True)
    table.add_column(f"needs for\n{threshold_db:g} dB", no_wrap=True)
    tensors = _distinct(by_tensor(found))
    for one in tensors[: limit or None]:
        cells = [_cell(one.rows[name], threshold_db) for name in wanted]
        more = f" [dim]and {len(one.others):,} more names[/]" if one.others else ""
        needed = one.needed(threshold_db) or "[red]none[/]"
        table.add_row(f"{escape(one.name)}{more}", *cells, needed)
    print_whole(table, console)
    for line in _footer(found, len(tensors), limit):
        console.print(line, style="dim", highlight=False, markup=False)
    for line in by_reason(found.skipped):
        console.print(f"not judged: {line}", highlight=False, markup=False, style="yellow")


def _footer(found: WhatIf, tensors: int, limit: int) -> list[str]:
    lines = [
        "SQNR in dB; u: share of the values that are not 0 and become 0, o: that lie beyond the "
        "largest value of their scale"
    ]
    if any(row.basis == "exponents" for row in found.rows):
        lines.append("~ estimated from exponents; for formats with blocks roughly")
    if limit and tensors > limit:
        lines.append(f"… and {tensors - limit:,} more that suffer less: raise --limit.")
    return lines


def _cell(row: Expected, threshold_db: float) -> str:
    if row.sqnr_db is None:
        return "all 0"
    mark = "~" if row.basis == "exponents" else ""
    number = f"{mark}{row.sqnr_db:.1f}"
    shares = [
        f"{letter}{_share(share)}"
        for letter, share in (("u", row.underflow), ("o", row.overflow))
        if share
    ]
    colour = "green" if row.sqnr_db >= threshold_db else "red"
    detail = f" [dim]{' '.join(shares)}[/]" if shares else ""
    return f"[{colour}]{number}[/]{detail}"


def _share(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else "<0.1%"
