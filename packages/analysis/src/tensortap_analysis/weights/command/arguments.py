"""What the commands about weights have in common: arguments that are parsed, and a bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

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
from tensortap_analysis.weights.health import SEVERITIES

Command = TypeVar("Command", bound=Callable[..., None])


def limits_of(texts: Iterable[str] | None, example: str = "sqnr_warning=25") -> dict[str, float]:
    """`["sqnr_warning=25"]` as a dictionary; raises `ConfigError`."""
    return dict(_limit(text, example) for text in texts or ())


def _limit(text: str, example: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise ConfigError(f"--threshold {text} is not NAME=VALUE, for example {example}.") from None


def check_file(option: str, path: Path | None, *endings: str) -> None:
    """Raise `ConfigError` for a file that cannot be written, or is named unlike its kind."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option} {path}: the file must end in {' or '.join(endings)}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: name a file in a folder that there is.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"{option} {path}: it may not be written there.")


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
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
