"""`tensortap compare`: where runs part from a reference; the verdict is the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tensortap.errors import ConfigError
from tensortap_analysis.comparing import compare
from tensortap_analysis.comparison import Comparison
from tensortap_analysis.findings import as_json, findings, header
from tensortap_analysis.tables import rendered, run_rows, summary, tensor_rows, tensors

_err = Console(stderr=True)
_CODES = {"agree": 0, "differ": 1, "incomparable": 2}

Runs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="REF RUN [RUN…]", help="Run directories, or importable folders."),
]


def compare_runs(
    runs: Runs = None,
    noise: Annotated[
        Path | None, typer.Option(help="A second reference: its error must be accepted.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="noise (default), classic or port.")] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Replace a threshold of the preset: ratio=2."),
    ] = None,
    select: Annotated[str, typer.Option(help="Names: globs with commas, ! excludes.")] = "*",
    step: Annotated[int | None, typer.Option(help="Only this step.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep everything measured as JSON.")] = None,
    saved: Annotated[
        Path | None, typer.Option("--from", help="Judge a saved comparison; no runs needed.")
    ] = None,
    details: Annotated[bool, typer.Option(help="All metrics of each tensor.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Tensors to list; 0 lists all.")] = 20,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV: runs; tensors with --details.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Find where runs part from a reference, and whether that is more than noise.

    Exit code: 0 they agree, 1 they differ beyond limits, 2 they could not be compared.
    """
    if json_ + csv + markdown > 1:
        raise ConfigError("--json, --csv and --markdown are three ways to print; choose one.")
    limits = dict(_threshold(text) for text in threshold or ())
    if saved is not None:
        found = _again(saved, runs, preset, limits)
    else:
        found = _measured(runs or [], noise, preset, limits, select, step)
    if save is not None:
        found.save(save)
    if json_:
        _say(json.dumps(as_json(found), indent=2))
    elif csv:
        _say(_csv(found, details))
    elif markdown:
        _say(_markdown(found, details, limit))
    else:
        _print(found, limit, details)
    _warn(found)
    raise typer.Exit(_CODES[found.verdict])


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise ConfigError(f"--threshold {text} is not NAME=VALUE, for example ratio=2.") from None


def _again(
    saved: Path, runs: list[Path] | None, preset: str | None, limits: dict[str, float]
) -> Comparison:
    if runs:
        raise ConfigError("--from judges what was saved; give either it or runs, not both.")
    found = Comparison.load(saved)
    if preset is None and not limits:
        return found
    return found.judge(preset, **limits)


def _measured(
    runs: list[Path],
    noise: Path | None,
    preset: str | None,
    limits: dict[str, float],
    select: str,
    step: int | None,
) -> Comparison:
    if len(runs) < 2:
        raise ConfigError("compare needs a reference and a run: tensortap compare REF RUN [RUN…].")
    with _progress() as progress:
        return compare(
            *runs,
            noise=noise,
            preset=preset or "noise",
            thresholds=limits,
            select=select,
            step=step,
            progress=progress,
        )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=_err, transient=True) as progress:
        task = progress.add_task("comparing", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _csv(found: Comparison, details: bool) -> str:
    if not details:
        return summary(found, "csv")
    return rendered([row for run in found.runs for row in tensor_rows(run)], "csv", {"run": "run"})


def _markdown(found: Comparison, details: bool, limit: int) -> str:
    parts = [summary(found, "markdown")]
    for run in found.runs:
        if run.first_divergence is not None:
            parts.append(f"First divergence of `{run.run.path}`: {run.first_divergence}")
        if details:
            parts.append(f"`{run.run.path}`\n\n{tensors(run, 'markdown', limit)}")
    return "\n\n".join(parts)


def _print(found: Comparison, limit: int, details: bool) -> None:
    _say(header(found))
    for run in found.runs:
        _say("")
        for line in findings(run, limit, details=details):
            _say(line)
    if run_rows(found):
        _say("")
        _say(summary(found))


def _warn(found: Comparison) -> None:
    """Warnings go where a pipe does not swallow them."""
    for warning in dict.fromkeys(text for run in found.runs for text in run.warnings):
        text = f"warning: {warning}"
        _err.print(text, style="bold yellow", highlight=False, markup=False, soft_wrap=True)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
