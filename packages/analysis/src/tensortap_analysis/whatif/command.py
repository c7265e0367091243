"""`tensortap formats`: which tensors survive which number format."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from tensortap import formats as known
from tensortap.errors import ConfigError, RunError
from tensortap.records import encode_float
from tensortap.tables import print_whole
from tensortap_analysis.whatif.judging import FORMATS, Expected, WhatIf, what_if

_COLUMNS = (
    "name", "format", "sqnr_db", "underflow", "overflow", "nonzero", "moments", "basis"
)  # fmt: skip


def formats(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    names: Annotated[
        str, typer.Option("--formats", help="Formats, with commas between them.")
    ] = ",".join(FORMATS),
    select: Annotated[
        str, typer.Option(help="Names: globs with commas, ! excludes, re: regex.")
    ] = "*",
    step: Annotated[int | None, typer.Option(help="Only this step.")] = None,
    threshold_db: Annotated[
        float, typer.Option(help="The SQNR that a format must reach to be recommended.")
    ] = 20.0,
    limit: Annotated[int, typer.Option(min=0, help="Tensors to print; 0 prints all.")] = 40,
    out: Annotated[
        Path | None, typer.Option(help="Also write all rows to this .csv, .md or .json file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print what number formats would do to each tensor: SQNR, and what underflows or overflows.

    The tensors that suffer most come first; `needs` is the format of the fewest stored bits that
    reaches --threshold-db. A ~ marks an estimate from an exponent histogram. Exit 1 when a tensor
    could not be judged, 2 when none could.
    """
    write = _writer(out)
    wanted = tuple(word.strip() for word in names.split(",") if word.strip())
    with _progress() as progress:
        found = what_if(run, formats=wanted, select=select, step=step, progress=progress)
    if not found.rows:
        reason = found.skipped[0] if found.skipped else "no format was asked for"
        raise RunError(f"{run}: no tensor could be judged; {reason}.")
    if out is not None:
        write(out, found, threshold_db)
    if as_json:
        sys.stdout.write(json.dumps(_document(found, threshold_db), indent=2) + "\n")
    else:
        _print(found, wanted, threshold_db, limit)
    raise typer.Exit(1 if _unjudged(found) else 0)


def by_tensor(found: WhatIf) -> list[dict[str, Expected]]:
    """Rows of one tensor together, by format; the tensor whose worst SQNR is lowest comes first."""
    groups: dict[tuple[str, str], dict[str, Expected]] = {}
    for row in found.rows:
        groups.setdefault((row.name, row.basis), {})[row.format] = row
    return sorted(groups.values(), key=lambda rows: min(map(_rank, rows.values())))


def _rank(row: Expected) -> float:
    return float("inf") if row.sqnr_db is None else row.sqnr_db


def needed(rows: dict[str, Expected], threshold_db: float) -> str | None:
    """The format of the fewest stored bits (then the highest SQNR) that reaches the threshold."""
    bits = {row.name: row.bits_stored for row in known.table()}
    enough = [row for row in rows.values() if _rank(row) >= threshold_db]
    return min(enough, key=lambda row: (bits[row.format], -_rank(row))).format if enough else None


def _unjudged(found: WhatIf) -> list[str]:
    """What should have been judged; integers are not rounded to formats and are not missing."""
    return [line for line in found.skipped if not line.endswith("is not rounded to a format")]


def _print(found: WhatIf, wanted: tuple[str, ...], threshold_db: float, limit: int) -> None:
    console = Console(soft_wrap=True)
    table = Table(box=None, header_style="bold")
    table.add_column("tensor", no_wrap=True)
    for name in wanted:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"needs for {threshold_db:g} dB", no_wrap=True)
    tensors = by_tensor(found)
    for rows in tensors[: limit or None]:
        first = next(iter(rows.values()))
        cells = [_cell(rows[name], threshold_db) for name in wanted]
        table.add_row(escape(first.name), *cells, needed(rows, threshold_db) or "[red]none[/]")
    print_whole(table, console)
    console.print("SQNR in dB (u: share of values that underflow, o: that overflow)", style="dim")
    if any(row.basis == "exponents" for row in found.rows):
        console.print("~ estimated from exponents; for formats with blocks roughly", style="dim")
    if limit and len(tensors) > limit:
        console.print(f"… and {len(tensors) - limit:,} more that suffer less: raise --limit.")
    for line in _grouped(found.skipped):
        console.print(f"not judged: {line}", highlight=False, markup=False, style="yellow")


def _grouped(skipped: tuple[str, ...]) -> list[str]:
    """One line for each reason, with how many tensors it holds for."""
    reasons: dict[str, list[str]] = {}
    for name, _, reason in (line.partition(": ") for line in skipped):
        reasons.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1:,} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in reasons.items()
    ]


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


def _document(found: WhatIf, threshold_db: float) -> dict[str, Any]:
    needs = {
        next(iter(rows.values())).name: needed(rows, threshold_db) for rows in by_tensor(found)
    }
    return {
        "threshold_db": threshold_db,
        "rows": [asdict(row) | {"sqnr_db": encode_float(row.sqnr_db)} for row in found.rows],
        "needs": needs,
        "skipped": list(found.skipped),
    }


def _writer(out: Path | None) -> Callable[[Path, WhatIf, float], None]:
    """By the ending; raises `ConfigError` before any work is done."""
    writers = {".csv": _write_csv, ".md": _write_markdown, ".json": _write_json}
    suffix = ".json" if out is None else out.suffix
    if suffix not in writers:
        raise ConfigError(f"--out {out}: the file must end in {', '.join(writers)}.")
    return writers[suffix]


def _write_csv(out: Path, found: WhatIf, threshold_db: float) -> None:
    with out.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, _COLUMNS)
        rows.writeheader()
        rows.writerows(asdict(row) for row in found.rows)


def _write_markdown(out: Path, found: WhatIf, threshold_db: float) -> None:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for row in found.rows:
        cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell)
                 for cell in asdict(row).values())  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(out: Path, found: WhatIf, threshold_db: float) -> None:
    out.write_text(json.dumps(_document(found, threshold_db), indent=2) + "\n", encoding="utf-8")


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rounding", total=None)
        yield lambda done: progress.update(task, completed=done, description=f"rounding {done:,}")
