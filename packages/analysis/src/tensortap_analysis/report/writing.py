"""`write_report`: runs in, one file out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tensortap.errors import ConfigError, RunError
from tensortap.selection import Selection
from tensortap.store.disk import replace_file
from tensortap_analysis.captured.sources import Named, Source, label, opened
from tensortap_analysis.captured.steps import spelled
from tensortap_analysis.comparison.comparing import compare
from tensortap_analysis.comparison.result import Comparison
from tensortap_analysis.judging.presets import preset as known_preset
from tensortap_analysis.outputs import require_writable
from tensortap_analysis.report.page import page
from tensortap_analysis.report.views import View, labels, view

ROWS = 5000
"""Rows of the table of tensors, unless told."""
_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, slots=True)
class Report:
    """What was written: the file, how much of what there is it lists, and what the runs lack.

    `verdict` is that of the comparison, `None` for a single run. `missing` are sentences.
    """

    path: Path
    nbytes: int
    runs: tuple[str, ...]
    verdict: str | None
    tensors: int
    listed: int
    missing: tuple[str, ...]


def write_report(
    out: str | os.PathLike[str],
    ref: Source,
    *runs: Source,
    noise: Source | None = None,
    preset: str = "noise",
    thresholds: Mapping[str, float] | None = None,
    select: str = "*",
    step: int | None = None,
    rows: int = ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write one self-contained HTML file about a run, or about runs compared with the first.

    At most `rows` tensors are listed, the worst; charts hold a bounded number of points, and the
    page says what it leaves out. An existing file is replaced once the new one is whole. Raises
    `RunError` for what is no run, `ConfigError` and `SelectionError` for what cannot be asked.
    """
    path = _target(out)
    known_preset(preset, thresholds)
    if noise is not None and not runs:
        raise ConfigError("A noise run judges a comparison; give a second run to compare.")
    with ExitStack() as stack:
        sources = [
            Named(stack.enter_context(opened(source)), label(source)) for source in (ref, *runs)
        ]
        views = _views(sources, select, step)
        found = None
        if runs:
            found = compare(
                *sources, noise=noise, preset=preset, thresholds=thresholds or {}, select=select,
                step=step, progress=progress,
            )  # fmt: skip
    made = page(views, found, rows)
    replace_file(path, made.html.encode(), sync=False)
    return Report(
        path, path.stat().st_size, tuple(one.path for one in views),
        None if found is None else found.verdict, made.tensors, made.listed,
        _missing(views, found),
    )  # fmt: skip


def _target(out: str | os.PathLike[str]) -> Path:
    """Where to write; raises `ConfigError` before any work is done."""
    path = Path(out)
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--out {path}: a report is an HTML file; name it …{_SUFFIXES[0]}.")
    require_writable(path)
    return path


def _views(sources: Sequence[Named], select: str, step: int | None) -> list[View]:
    """All runs; raises `SelectionError` or `RunError` where nothing of any is selected."""
    paths = [source.label for source in sources]
    called = zip(sources, labels(paths), strict=True)
    views = [view(one.run, one.label, short, select, step) for one, short in called]
    runs = [source.run for source in sources]
    names = sorted({name for run in runs for name in (*run.names(), *run.part_names())})
    wanted = Selection.parse(select)
    if not any(map(wanted.matches, names)):
        raise wanted.nothing_in(names, " and ".join(paths))
    steps = sorted({number for one in views for number in one.steps})
    if step is not None and step not in steps:
        known = f"captured: {spelled(steps)}."
        raise RunError(f"Nothing was captured at step {step} in {' and '.join(paths)}; {known}")
    return views


def _missing(views: list[View], found: Comparison | None) -> tuple[str, ...]:
    lines = [f"{one.label} is incomplete: {why}" for one in views for why in one.problems]
    for run in found.runs if found is not None else ():
        if run.verdict == "incomparable":
            shared = any(one.where == "both" for one in run.unpaired)
            why = "" if shared else ": nothing in common"
            lines.append(f"{run.run.path} could not be compared{why}.")
        damaged = [one for one in run.unpaired if one.kind in ("damaged", "unwritten")]
        if damaged:
            lines.append(
                f"{run.run.path}: {len(damaged):,} tensors could not be read; the first is "
                f"{damaged[0].name}: {damaged[0].reason}"
            )
    return tuple(lines)
