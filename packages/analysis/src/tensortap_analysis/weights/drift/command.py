"""`tensortap diff-weights`: what changed between checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tensortap.errors import ConfigError
from tensortap.tables import print_whole
from tensortap_analysis.options import limits_of
from tensortap_analysis.progress import warn
from tensortap_analysis.weights.command.arguments import (
    byte_progress,
    check_fail_on,
    check_file,
    interruptible,
    say_written,
    takes_workers,
    unmatched,
)
from tensortap_analysis.weights.command.tables import shown, skipped_lines
from tensortap_analysis.weights.drift.alerts import limits_of_preset, overall_alerts
from tensortap_analysis.weights.drift.document import check_replaced, document, save
from tensortap_analysis.weights.drift.notices import notices
from tensortap_analysis.weights.drift.returning import alerts_of_steps
from tensortap_analysis.weights.drift.tables import alert_lines, change_table, trend_table
from tensortap_analysis.weights.drift.tracking import Drift, track
from tensortap_analysis.weights.health import SEVERITIES, Issue
from tensortap_analysis.weights.scope import Scope


@takes_workers
def diff_weights(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C…]", help="Checkpoints in order; each as tensortap scan takes them."
        ),
    ],
    select: Annotated[str, typer.Option(help="Layers: globs with commas, ! excludes.")] = "*",
    parallel: Annotated[
        int, typer.Option(min=0, metavar="[N]", help="Workers; without a number, one a core.")
    ] = 1,
    spectral: Annotated[
        bool, typer.Option(help="Also compare spectra, which takes most of the time.")
    ] = True,
    preset: Annotated[str, typer.Option(help="What is odd: default or classic.")] = "default",
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Replace a limit: explosion=5."),
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Exit 1 on an alert of critical, warning or info.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the drift to this .png file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a report that opens in a browser, with charts.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Save everything to this .json file.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Lines to print; 0 prints all.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare checkpoints of one model, each with the one before: how far every weight went.

    The change is ||after - before|| / ||before||; alerts say what exploded, collapsed or stalled.
    Exit code: 0 compared, 1 an alert of the severity that --fail-on names, 2 it could not be done,
    130 interrupted.
    """
    limits = limits_of(threshold, "explosion=5")
    limits_of_preset(preset, limits)
    check_fail_on(fail_on)
    _check_files(plot, html, output)
    if len(models) < 2:
        raise ConfigError("diff-weights needs two checkpoints: tensortap diff-weights A B.")
    scopes = [Scope(model) for model in models]
    warn(unmatched(scopes, select))
    with interruptible(lambda: "nothing is kept."), byte_progress("comparing") as progress:
        steps = track(
            scopes, select=select, parallel=parallel, spectral=spectral, progress=progress
        )
    issues = alerts_of_steps(steps, preset, limits)
    issues.append(overall_alerts(steps, preset, limits))
    _write(steps, issues, plot, html, output)
    if as_json:
        sys.stdout.write(json.dumps(document(steps, issues), indent=1) + "\n")
    else:
        _print(steps, issues, limit)
    say_written(output, plot, html)
    raise typer.Exit(1 if _failed(issues, fail_on) else 0)


def _failed(issues: Sequence[Sequence[Issue]], fail_on: str | None) -> bool:
    severe = [] if fail_on is None else SEVERITIES[: SEVERITIES.index(fail_on) + 1]
    return any(issue.severity in severe for some in issues for issue in some)


def _check_files(plot: Path | None, html: Path | None, output: Path | None) -> None:
    """Raise `ConfigError` for what cannot be written, before anything is read."""
    check_file("--plot", plot, ".png")
    check_file("--html", html, ".html", ".htm")
    check_file("--output", output, ".json")
    if output is not None:
        check_replaced(output)


def _write(
    steps: Sequence[Drift],
    issues: Sequence[Sequence[Issue]],
    plot: Path | None,
    html: Path | None,
    output: Path | None,
) -> None:
    """Matplotlib and plotly take a while to import, and tables do not need them."""
    if output is not None:
        save(output, steps, issues)
    if plot is not None:
        from tensortap_analysis.weights.drift.plot import draw_drift

        draw_drift(steps, plot)
    if html is not None:
        from tensortap_analysis.weights.report.drift_page import write_drift_report

        write_drift_report(html, steps, issues)


def _print(steps: Sequence[Drift], issues: Sequence[Sequence[Issue]], limit: int) -> None:
    console = Console(soft_wrap=True, highlight=False)
    many = len(steps) > 1
    print_whole(trend_table(steps, limit) if many else change_table(steps[0], limit), console)
    count = len(dict.fromkeys(layer for step in steps for layer in step.layers))
    if limit and count > limit:
        console.print(f"… and {count - limit:,} more weights: raise --limit.")
    for at, (step, some) in enumerate(zip(steps, issues[:-1], strict=True)):
        number = f"{at + 1}: " if many else ""
        found = f"{len(some):,} alert{'s'[: len(some) != 1]}" if some else "nothing odd"
        console.print(f"{number}[bold]{shown(step.before)} → {shown(step.after)}[/]: {found}")
        for line in alert_lines(some, limit):
            console.print(line)
        for line in skipped_lines(step.skipped):
            console.print(line, style="dim")
    for sentence in notices(steps):
        console.print(f"[yellow]{shown(sentence)}[/]")
    if issues[-1]:
        console.print("[bold]over all steps[/]")
        for line in alert_lines(issues[-1], limit):
            console.print(line)
