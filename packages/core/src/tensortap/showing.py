"""What `show` and `coverage` say of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape

from tensortap.coverage import coverage_report
from tensortap.nonfinite import first_nonfinite, nonfinite_table, records_of
from tensortap.records import TensorRecord
from tensortap.selection import Selection
from tensortap.store import Run


def records_shown(
    run: Run, select: str, step: int | None, rank: int | None, *, nonfinite: bool
) -> tuple[Iterator[TensorRecord], int | None]:
    """What `show` prints, and how many there are, where that is known before they are read."""
    if not nonfinite:
        return run.records(select, step=step, rank=rank), None
    table = nonfinite_table(run, select, step=step, rank=rank)
    return records_of(run, table), len(table)


def selected_parts(run: Run, select: str) -> dict[str, str]:
    """Parts that are selected while the tensors they are cut from are not, and those tensors."""
    wanted = Selection.parse(select)
    return {
        part: fused
        for part, fused in run.part_sources().items()
        if wanted.matches(part) and not wanted.matches(fused) and not wanted.excludes(fused)
    }


def summary(run: Run) -> dict[str, Any]:
    """The facts of a run, as plain JSON."""
    coverage = run.coverage()
    first = first_nonfinite(run)
    return {
        "run": str(run.path),
        "model": run.info.model_class,
        "created": run.info.created,
        "ranks": sorted(run.ranks),
        "names": len(run.names()),
        "steps": coverage.get("steps"),
        "records": coverage.get("records"),
        "complete": run.complete,
        "first_nonfinite": None if first is None else first.as_dict(),
        "problems": list(run.problems),
    }


def print_summary(run: Run, console: Console) -> None:
    """A line on the run, where NaN or infinity begins in it, and its problems."""
    facts = summary(run)
    state = "[green]complete[/]" if run.complete else "[red]incomplete[/]"
    path, model = escape(str(run.path)), escape(facts["model"])
    ranks, names = len(facts["ranks"]), facts["names"]
    console.print(f"[bold]{path}[/]  {model}, {ranks} rank(s), {names} names, {state}")
    if facts["first_nonfinite"] is not None:
        line = f"  first NaN or Inf: {facts['first_nonfinite']['says']}"
        console.print(line, style="red", highlight=False, markup=False)
    for problem in facts["problems"]:
        console.print(f"  {problem}", style="yellow", highlight=False, markup=False)


def uncovered(run: Run) -> dict[str, Any]:
    """What can be said of a run that has not written its coverage report, and why not."""
    captured = Counter(str(record.name) for record in run.records())
    reason = (
        "the run is still being written, and says at its end what is missing"
        if run.live
        else "the process ended before it wrote its coverage, so what is missing is not known"
    )
    return coverage_report(
        complete=False,
        steps=len(run.steps),
        records=captured.total(),
        captured=captured,
        gaps=Counter({("*", reason): 1}),
        notes=Counter(),
    )
