"""`tensortap plot`: all pictures of a run at once."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tensortap_analysis.options import RunPath, Step
from tensortap_analysis.progress import told, warn

if TYPE_CHECKING:
    from tensortap_analysis.plots.gallery import Plotted

_SHOWN = 10


def plot(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="The folder to make; refused when it exists.")],
    against: Annotated[
        Path | None, typer.Option(metavar="REF", help="Compare with this run.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="Draw these single tensors, not the worst: globs with commas, ! excludes."
        ),
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many single tensors to draw.")] = 12,
    step: Step = None,
    causal: Annotated[bool, typer.Option(help="Recompute attention with the causal mask.")] = True,
    layout: Annotated[
        str | None,
        typer.Option(help="The layout of a folder that is no run; default: each is tried."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="List what was written as JSON.")] = False,
) -> None:
    """Draw a run: summaries of all tensors, and the worst of them one by one.

    Worst are tensors with some NaN or Inf, the first in execution order in front, then those whose
    farthest value is the most standard deviations from the mean, or with --against those of the
    largest relative L2 error.

    Exit 0 when all was drawn that the captured values allow, 1 when a tensor could not be read,
    2 when none could.
    """
    # Every `tensortap` command loads this file, and matplotlib takes half a second.
    from tensortap_analysis.captured.sources import opened
    from tensortap_analysis.plots.gallery import plot as draw

    with ExitStack() as stack:
        shown = stack.enter_context(opened(run, layout))
        ref = None if against is None else stack.enter_context(opened(against, layout))
        progress = stack.enter_context(told("drawing"))
        done = draw(
            shown, out, against=ref, select=select, step=step, count=worst, causal=causal,
            called=str(run), progress=progress,
        )  # fmt: skip
    if as_json:
        _print_json(done)
    else:
        _print(done, out)
    warn(done.problems)
    raise typer.Exit(1 if done.failed else 0)


def _print_json(done: Plotted) -> None:
    listed = {
        "files": [str(path) for path in done.files],
        "left_out": done.left_out,
        "failed": done.failed,
        "problems": done.problems,
    }
    sys.stdout.write(json.dumps(listed, indent=2) + "\n")


def _print(done: Plotted, out: Path) -> None:
    console = Console(soft_wrap=True)
    console.print(f"{len(done.files):,} files in {out}", highlight=False, markup=False)
    for folder, count in Counter(path.parent for path in done.files).items():
        names = [path.name for path in done.files if path.parent == folder]
        listed = ", ".join(names) if folder == out else f"{folder.name}/  {count:,}"
        console.print(f"  {listed}", highlight=False, markup=False)
    for title, lines, style in (
        ("not drawn", done.left_out, "dim"), ("could not be read", done.failed, "red"),
    ):  # fmt: skip
        for line in lines[:_SHOWN]:
            console.print(f"{title}: {line}", style=style, highlight=False, markup=False)
        if len(lines) > _SHOWN:
            console.print(f"{title}: … and {len(lines) - _SHOWN:,} more", style=style)
