"""`tensortap report`: one HTML file about one or more runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tensortap_analysis.options import Noise, Select, Step, Thresholds, limits_of
from tensortap_analysis.progress import counted

if TYPE_CHECKING:
    from tensortap_analysis.report.writing import Report

_FEW = 5


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="Runs, or importable folders; the first is the REF."),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file; replaced when it exists.")] = Path(
        "report.html"
    ),
    noise: Noise = None,
    preset: Annotated[str, typer.Option(help="noise, classic or port.")] = "noise",
    threshold: Thresholds = None,
    select: Select = "*",
    step: Step = None,
    rows: Annotated[int, typer.Option(min=1, help="Most tensors in the table.")] = 5000,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was written as JSON.")
    ] = False,
) -> None:
    """Write one self-contained HTML file: summary, divergence, charts, tensors, environment.

    It opens offline, in any browser. Exit code: 0 written, 1 written but something is missing in
    it (an incomplete run, or one that could not be compared), 2 nothing was written. Whether runs
    agree is in the file and in --json; `tensortap compare` makes it an exit code.
    """
    # plotly takes a while to import, and other commands do not need it.
    from tensortap_analysis.report.writing import write_report

    thresholds = limits_of(threshold)
    with counted("comparing") as progress:
        done = write_report(
            out, *runs, noise=noise, preset=preset, thresholds=thresholds, select=select, step=step,
            rows=rows, progress=progress,
        )  # fmt: skip
    if as_json:
        _print_json(done)
    else:
        _print(done)
    raise typer.Exit(1 if done.missing else 0)


def _print_json(done: Report) -> None:
    listed = {
        "out": str(done.path),
        "bytes": done.nbytes,
        "runs": list(done.runs),
        "verdict": done.verdict,
        "tensors": done.tensors,
        "listed": done.listed,
        "missing": list(done.missing),
    }
    sys.stdout.write(json.dumps(listed, indent=2) + "\n")


def _print(done: Report) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    verdict = f"; the runs: {done.verdict}" if done.verdict else ""
    cut = f"the worst {done.listed:,} of " if done.listed < done.tensors else ""
    size = done.nbytes / 2**20
    console.print(f"{done.path} ({size:.1f} MiB): {cut}{done.tensors:,} tensors{verdict}")
    for line in done.missing[:_FEW]:
        console.print(line, style="yellow")
    if len(done.missing) > _FEW:
        console.print(f"… and {len(done.missing) - _FEW:,} more", style="yellow")
