"""What the commands about weights have in common: arguments that are parsed, and a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tensortap.errors import ConfigError
from tensortap_analysis.weights.health import SEVERITIES


def limits_of(texts: Iterable[str] | None) -> dict[str, float]:
    """`["sqnr_warning=25"]` as a dictionary; raises `ConfigError`."""
    return dict(map(_limit, texts or ()))


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise ConfigError(
            f"--threshold {text} is not NAME=VALUE, for example sqnr_warning=25."
        ) from None


def check_fail_on(word: str | None) -> None:
    """Raise `ConfigError` for a severity there is not."""
    if word is not None and word not in SEVERITIES:
        raise ConfigError(f"--fail-on {word} is none of {', '.join(SEVERITIES)}.")


def workers_of(words: Sequence[str], parallel: bool) -> tuple[list[str], bool | int]:
    """`--parallel` may be followed by a number, which then stands among the arguments."""
    # A checkpoint may be called by its step: `diff-weights --parallel 100 200` means two folders.
    numbers = [word for word in words if word.isdecimal() and not Path(word).exists()]
    if not parallel or len(words) < 2 or len(numbers) != 1:
        return list(words), parallel
    return [word for word in words if word not in numbers], int(numbers[0])


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
