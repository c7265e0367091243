"""What commands say on stderr: progress bars where somebody watches, and warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

_PROBLEMS = 10


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


def warn_incomplete(problems: Sequence[str]) -> None:
    """Say what a run lacks, in yellow; nothing where it is whole."""
    console = Console(stderr=True, soft_wrap=True)
    for problem in problems[:_PROBLEMS]:
        console.print(f"incomplete: {problem}", style="yellow", highlight=False, markup=False)
    if len(problems) > _PROBLEMS:
        console.print(f"incomplete: and {len(problems) - _PROBLEMS:,} more", style="yellow")
