"""statistics/: mean, std, absmax and outliers of every tensor, across depth and across steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from tensortap.names import PHASES
from tensortap_analysis.captured.words import family_of, layer_of
from tensortap_analysis.plots.grids import ROWS, Grid, by_depth, paint
from tensortap_analysis.plots.style import COLOURS, Floats, few_ticks, figure, save
from tensortap_analysis.plots.survey import Survey

_PANELS = (("mean", True), ("std", False), ("absmax", False), ("outliers", False))
_TITLES = {"outliers": "max |x - mean| / std"}


def draw(found: Survey, out: Path, called: str) -> Iterator[Path]:
    """A picture for each phase across depth, one across steps, and the residual stream's lines.

    `called` is what the titles call the run.
    """
    for phase in PHASES:
        yield from _phase(found, out, phase, called)
    if any(map(_is_stream, found.present)):
        yield _stream(found, out / "residual_stream.png", called)


def _phase(found: Survey, out: Path, phase: str, called: str) -> Iterator[Path]:
    names = [name for name in found.present if name.split("/")[1] == phase]
    places = {
        name: (family_of(name), layer) for name in names if (layer := layer_of(name)) is not None
    }
    if places:
        last = {key: _latest(found.by_step(getattr(found, key))) for key, _ in _PANELS}
        grids = [by_depth(found.names, places, last[key]) for key, _ in _PANELS]
        title = f"{called}, {phase}: statistics by depth, latest step of each tensor"
        yield _grids(grids, "layer", out / f"{phase}_depth.png", title)
    if len(found.steps) > 1 and names:
        yield _steps(found, names, phase, out, called)


def _steps(found: Survey, names: Sequence[str], phase: str, out: Path, called: str) -> Path:
    """Layers are merged: the value of largest magnitude of a family in each step."""
    index = {name: at for at, name in enumerate(found.names)}
    families: dict[str, list[int]] = {}
    for name in names:
        families.setdefault(family_of(name), []).append(index[name])
    grids = []
    for key, _ in _PANELS:
        by_step = found.by_step(getattr(found, key))
        values = np.array([_largest(by_step[rows]) for rows in families.values()])
        grids.append(Grid(tuple(families), found.steps, values))
    title = f"{called}, {phase}: statistics by step, the largest magnitude of all layers"
    return _grids(grids, "step", out / f"{phase}_steps.png", title)


def _latest(by_step: Floats) -> Floats:
    """The value at the last step that has one, by name."""
    known = ~np.isnan(by_step)
    last = by_step.shape[1] - 1 - known[:, ::-1].argmax(axis=1)
    picked: Floats = by_step[np.arange(len(by_step)), last]
    return picked


def _largest(values: Floats) -> Floats:
    """Of each column the value of largest magnitude."""
    sizes = np.where(np.isnan(values), -1, np.abs(values))
    picked: Floats = values[sizes.argmax(axis=0), np.arange(values.shape[1])]
    return picked


def _grids(grids: Sequence[Grid], xlabel: str, path: Path, title: str) -> Path:
    shown, note = list(grids), ""
    if len(grids[0].rows) > ROWS:
        kept = _kept(grids[-1])
        shown = [Grid(tuple(g.rows[at] for at in kept), g.columns, g.values[kept]) for g in grids]
        note = f"the {ROWS} of {len(grids[0].rows)} families whose values stand out most"
    drawn = figure(12, max(2.2, 1.4 + 0.16 * len(shown[0].rows)))
    panels = drawn.subplots(1, len(shown), sharey=True)
    for axes, grid, (key, signed) in zip(panels, shown, _PANELS, strict=True):
        paint(axes, grid, _TITLES.get(key, key), xlabel, signed=signed)
    return save(drawn, path, title, note)


def _kept(grid: Grid) -> list[int]:
    """Rows that stand out most, in their order."""
    largest = np.nan_to_num(np.where(np.isnan(grid.values), 0, grid.values)).max(axis=1)
    return sorted(np.argsort(-largest)[:ROWS].tolist())


def _is_stream(name: str) -> bool:
    return family_of(name) == "layer/forward/output" and layer_of(name) is not None


def _stream(found: Survey, path: Path, called: str) -> Path:
    """What each layer hands on, at the first, the middle and the last step."""
    rows = sorted(
        (layer_of(name) or 0, at) for at, name in enumerate(found.names) if _is_stream(name)
    )
    layers, at = [layer for layer, _ in rows], [row for _, row in rows]
    steps = sorted({0, len(found.steps) // 2, len(found.steps) - 1})
    drawn = figure(9.6, 2.9)
    panels = drawn.subplots(1, 3)
    mean, std = (found.by_step(values)[at] for values in (found.mean, found.std))
    for step, colour in zip(steps, COLOURS, strict=False):
        word = f"step {found.steps[step]}"
        panels[0].plot(layers, mean[:, step], "o-", ms=2.5, color=colour, label=word)
        panels[0].fill_between(
            layers, mean[:, step] - std[:, step], mean[:, step] + std[:, step],
            color=colour, alpha=0.12, lw=0,
        )  # fmt: skip
        _line(panels[1], layers, found.by_step(found.absmax)[at][:, step], colour, word)
        _line(panels[2], layers, found.by_step(found.outliers)[at][:, step], colour, word)
    for axes, title in zip(panels, ("mean ± std", "absmax", "max |x - mean| / std"), strict=True):
        axes.set(title=title, xlabel="layer", xlim=(min(layers) - 0.5, max(layers) + 0.5))
        few_ticks(axes)
    panels[0].legend()
    gone = [layer for layer, row in zip(layers, mean, strict=True) if np.isnan(row[steps[-1]])]
    note = f"no finite value at step {found.steps[-1]} in layers {_listed(gone)}" if gone else ""
    return save(drawn, path, f"{called}: the residual stream, layers.*/forward/output", note)


def _listed(layers: Sequence[int]) -> str:
    shown = ", ".join(map(str, layers[:8]))
    return f"{shown} and {len(layers) - 8} more" if len(layers) > 8 else shown


def _line(axes: Axes, layers: Sequence[int], values: Floats, colour: str, word: str) -> None:
    axes.plot(layers, values, "o-", ms=2.5, color=colour, label=word)
    known = values[np.isfinite(values) & (values > 0)]
    if known.size and known.max() > 20 * known.min():
        axes.set_yscale("log")
