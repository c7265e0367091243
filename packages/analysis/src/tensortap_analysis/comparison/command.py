"""`tensortap compare`: where runs part from a reference; the verdict is the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tensortap.errors import ConfigError
from tensortap_analysis.comparison.comparing import compare
from tensortap_analysis.comparison.documents import as_json
from tensortap_analysis.comparison.findings import findings, header
from tensortap_analysis.comparison.outcome import RunComparison
from tensortap_analysis.comparison.result import Comparison
from tensortap_analysis.comparison.tables import (
    layers,
    summary,
    telling_moment,
    tensor_rows,
    tensors,
    unpaired_rows,
)
from tensortap_analysis.options import Noise, Select, Step, Thresholds, limits_of
from tensortap_analysis.outputs import require_writable
from tensortap_analysis.progress import counted
from tensortap_analysis.rendering import as_markdown, rendered

_err = Console(stderr=True)
_CODES = {"agree": 0, "differ": 1, "incomparable": 2}

Runs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="REF RUN [RUN…]", help="Run directories, or importable folders."),
]


def compare_runs(
    runs: Runs = None,
    noise: Noise = None,
    preset: Annotated[str | None, typer.Option(help="noise (default), classic or port.")] = None,
    threshold: Thresholds = None,
    select: Select = "*",
    step: Step = None,
    save: Annotated[Path | None, typer.Option(help="Keep everything measured as JSON.")] = None,
    saved: Annotated[
        Path | None,
        typer.Option("--from", help="Judge a saved comparison again, without the runs."),
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

    Exit code: 0 they agree in all that could be compared (a warning says what could not), 1 they
    differ: beyond limits, in shape, or ranks contradict each other; 2 nobody can say: nothing in
    common, something is lost or damaged, or --preset classic or port has only statistics to go by.
    """
    if json_ + csv + markdown > 1:
        raise ConfigError("--json, --csv and --markdown are three ways to print; choose one.")
    wanted = limits_of(threshold)
    if save is not None:
        require_writable(save, "--save")
    if saved is not None:
        found = _again(saved, runs, noise, preset, wanted, select, step)
    else:
        found = _measured(runs or [], noise, preset, wanted, select, step)
    if json_:
        _say(json.dumps(as_json(found), indent=2))
    elif csv:
        _say(_csv(found, details))
    elif markdown:
        _say(_markdown(found, details, limit))
    else:
        _print(found, limit, details)
    _warn(found)
    if save is not None:
        found.save(save)
    raise typer.Exit(_CODES[found.verdict])


def _again(
    saved: Path, runs: list[Path] | None, noise: Path | None, preset: str | None,
    thresholds: dict[str, float], select: str, step: int | None,
) -> Comparison:  # fmt: skip
    if runs:
        raise ConfigError("--from judges what was saved; give either it or runs, not both.")
    if noise is not None:
        raise ConfigError(
            "--from knows the noise run that the comparison was saved with; another one has to be "
            "measured: leave --from out, and give REF and RUN."
        )
    found = Comparison.load(saved)
    if (select, step) != ("*", None):
        found = found.narrowed(select, step=step)
    return found if preset is None and not thresholds else found.judge(preset, **thresholds)


def _measured(
    runs: list[Path],
    noise: Path | None,
    preset: str | None,
    thresholds: dict[str, float],
    select: str,
    step: int | None,
) -> Comparison:
    if len(runs) < 2:
        raise ConfigError("compare needs a reference and a run: tensortap compare REF RUN [RUN…].")
    with counted("comparing") as progress:
        return compare(
            *runs,
            noise=noise,
            preset=preset or "noise",
            thresholds=thresholds,
            select=select,
            step=step,
            progress=progress,
        )


def _csv(found: Comparison, details: bool) -> str:
    if not details:
        return summary(found, "csv")
    rows = [row for run in found.runs for row in (*tensor_rows(run), *unpaired_rows(run))]
    return rendered(rows, "csv", {"run": "run"})


def _markdown(found: Comparison, details: bool, limit: int) -> str:
    parts = [summary(found, "markdown"), *_bullets(f"Warning: {text}" for text in _warnings(found))]
    for run in found.runs:
        parts += _markdown_of(run)
        if details:
            parts.append(f"`{as_markdown(run.run.path)}`\n\n{tensors(run, 'markdown', limit)}")
    return "\n\n".join(parts)


def _markdown_of(run: RunComparison) -> Iterator[str]:
    """First divergence, error by depth, jumps, abnormal tensors, and what was not compared."""
    path = f"`{as_markdown(run.run.path)}`"
    if run.first_divergence is not None:
        yield f"First divergence of {path}: {as_markdown(str(run.first_divergence))}"
        if len(run.depth) > 1:
            table = layers(run, "markdown")
            yield f"Error by depth of {path}, {telling_moment(run)}, `~` is an estimate:\n\n{table}"
    lines = [
        *(f"abnormal: {text}" for text in run.abnormal),
        *(f"jump between layers: {change}" for change in run.jumps),
        *(f"not compared: {one.name}: {one.reason}" for one in run.unpaired),
    ]
    if lines:
        yield f"Of {path}:"
        yield from _bullets(lines)


def _bullets(lines: Iterable[str]) -> Iterator[str]:
    text = "\n".join(f"- {as_markdown(line)}" for line in lines)
    if text:
        yield text


def _print(found: Comparison, limit: int, details: bool) -> None:
    width = Console().width if sys.stdout.isatty() else None
    _say(header(found))
    for run in found.runs:
        _say("")
        for line in findings(run, limit, details=details, width=width):
            _say(line)
    if found.runs:
        _say("")
        _say(summary(found, width=width))


def _warn(found: Comparison) -> None:
    """Warnings go where a pipe does not swallow them."""
    sys.stdout.flush()
    for warning in _warnings(found):
        text = f"warning: {warning}"
        _err.print(text, style="bold yellow", highlight=False, markup=False, soft_wrap=True)


def _warnings(found: Comparison) -> list[str]:
    every = (*found.remarks, *(text for run in found.runs for text in run.warnings))
    return list(dict.fromkeys(every))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
