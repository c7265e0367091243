"""What the commands about weights have in common: arguments that are parsed, and a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from typer.core import TyperCommand

from tensortap.errors import ConfigError
from tensortap_analysis.outputs import require_writable
from tensortap_analysis.weights.health import SEVERITIES
from tensortap_analysis.weights.scope import Scope

Command = TypeVar("Command", bound=Callable[..., None])


def check_file(option: str, path: Path | None, *endings: str) -> None:
    """Raise `ConfigError` for a file that cannot be written, or is named unlike its kind."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option} {path}: the file must end in {' or '.join(endings)}.")
    require_writable(path, option)


def say_written(*paths: Path | None) -> None:
    """Name the files that were written, on stderr."""
    if names := [str(path) for path in paths if path is not None]:
        Console(stderr=True, soft_wrap=True).print(
            f"wrote {', '.join(names)}", highlight=False, markup=False
        )


@contextmanager
def interruptible(sentence: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C ends with exit code 130 and one line, which says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True, soft_wrap=True).print(
            f"interrupted: {sentence()}", highlight=False, markup=False
        )
        raise typer.Exit(130) from None


def unmatched(scopes: Sequence[Scope], select: str) -> list[str]:
    """A sentence for each pattern that matches nothing in any of them, among others that do.

    Raises `SelectionError` where none does.
    """
    for scope in scopes:
        scope.weights(select)
    dead = [set(scope.unmatched(select)) for scope in scopes]
    where = ", ".join(scope.source.label for scope in scopes)
    return [
        f"the pattern {pattern!r} matches nothing in {where}"
        for pattern in sorted(set.intersection(*dead))
    ]


def check_fail_on(word: str | None) -> None:
    """Raise `ConfigError` for a severity there is not."""
    if word is not None and word not in SEVERITIES:
        raise ConfigError(f"--fail-on {word} is none of {', '.join(SEVERITIES)}.")


def takes_workers(command: Command) -> Command:
    """Let `--parallel` stand alone (every core), or before or joined to a number."""
    vars(command)["command_class"] = _WithWorkers
    return command


class _WithWorkers(TyperCommand):
    """Typer has no options whose value may be left out: it is put in before parsing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_number(args))


def _with_number(words: Sequence[str]) -> list[str]:
    """`--parallel` as `--parallel=N`, 0 without a number."""
    if "--parallel" not in words:
        return list(words)
    place = words.index("--parallel")
    before, after = words[:place], words[place + 1 :]
    # A checkpoint may be called by its step: `diff-weights --parallel 100 200` means two folders.
    if after and after[0].isdecimal() and not Path(after[0]).exists():
        return [*before, f"--parallel={after[0]}", *after[1:]]
    return [*before, "--parallel=0", *after]


@contextmanager
def byte_progress(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; what it yields takes the bytes that are done and those there are."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    # A bar that nobody sees leaves an empty line in front of an error.
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
