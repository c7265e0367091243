"""What commands say on stderr: progress bars where somebody watches, and warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tensortap.store import Run

_WARNINGS = 10


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar for work whose amount is known; call with what is done, and of how much."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _shown(columns) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def told(what: str) -> Iterator[Callable[[str], None]]:
    """A bar for work in steps that have names; call with the name of the next one."""
    with _shown((SpinnerColumn(), BarColumn(), TimeElapsedColumn())) as progress:
        task = progress.add_task(what, total=None)
        yield lambda name: progress.update(task, description=f"{what} {name}")


def _shown(columns: tuple[object, ...]) -> Progress:
    console = Console(stderr=True)
    # A bar that nobody sees leaves an empty line in front of an error.
    hidden = not console.is_terminal
    text = TextColumn("{task.description}")
    return Progress(text, *columns, console=console, transient=True, disable=hidden)  # type: ignore[arg-type]


def warn(lines: Sequence[str]) -> None:
    """Say what a run lacks, or what else deserves a look, in yellow."""
    console = Console(stderr=True, soft_wrap=True)
    for line in lines[:_WARNINGS]:
        console.print(f"warning: {line}", style="yellow", highlight=False, markup=False)
    if len(lines) > _WARNINGS:
        console.print(f"warning: and {len(lines) - _WARNINGS:,} more", style="yellow")


def unmatched(run: Run, select: str | Iterable[str]) -> list[str]:
    """A sentence for each pattern that matches nothing among others that do."""
    return [
        f"the pattern {pattern!r} matches nothing in {run.path}"
        for pattern in run.unmatched(select)
    ]
