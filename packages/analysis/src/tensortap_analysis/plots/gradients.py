"""gradients/: norms and distributions by depth and step; what vanishes or explodes is marked.

A gradient *explodes* when its root mean square is more than 100 times the median of its family
(the same tensor of all layers, at all steps); it *vanishes* when it is less than a hundredth of
that, or all zero. One with NaN or Inf is neither, and marked as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from tensortap_analysis.captured.words import family_of, layer_of
from tensortap_analysis.plots.grids import ROWS, Grid, by_depth, paint
from tensortap_analysis.plots.samples import Sample
from tensortap_analysis.plots.style import (
    BLUE,
    COLOURS,
    ORANGE,
    RED,
    SKY,
    Floats,
    few_ticks,
    figure,
    labelled,
    save,
    say,
)
from tensortap_analysis.plots.survey import Survey

FACTOR = 100.0
"""How far from its family's median a gradient vanishes or explodes."""
_LINES = 6
Places = Mapping[str, tuple[str, int]]


def is_gradient(name: str) -> bool:
    """A gradient of a parameter, or of what goes into or comes out of a module."""
    _, phase, tensor = name.split("/")
    return phase == "grad" or (phase == "backward" and tensor.startswith("grad_"))


def draw(
    found: Survey,
    out: Path,
    values: Callable[[Sequence[str]], Mapping[str, Sample]],
    called: str,
) -> Iterator[Path]:
    """Norms by depth and by step; distributions by depth, of the names that `values` can read.

    `called` is what the titles call the run.
    """
    names = [name for name in found.present if is_gradient(name)]
    if not names:
        return
    places = {
        name: (family_of(name), layer) for name in names if (layer := layer_of(name)) is not None
    }
    if places:
        yield _norms(found, places, out / "norms_depth.png", called)
        yield from _distributions(places, values, out / "distributions_depth.png", called)
    if len(found.steps) > 1:
        yield _by_step(found, names, out / "norms_steps.png", called)


def judged(found: Survey, names: Sequence[str]) -> dict[str, str]:
    """`NaN or Inf`, `exploding` or `vanishing` for each name that is one of them at some step."""
    rms, strange = found.by_step(found.rms), found.by_step(found.nonfinite.astype(np.float64))
    rows: dict[str, list[int]] = {}
    wanted = set(names)
    for at, name in enumerate(found.names):
        if name in wanted:
            rows.setdefault(family_of(name), []).append(at)
    verdicts = {}
    for members in rows.values():
        with np.errstate(all="ignore"):
            middle = np.nanmedian(rms[members]) if np.isfinite(rms[members]).any() else np.nan
        for at in members:
            verdict = _verdict(rms[at], strange[at], float(middle))
            if verdict:
                verdicts[found.names[at]] = verdict
    return verdicts


def _verdict(rms: Floats, strange: Floats, middle: float) -> str | None:
    if (np.nan_to_num(strange) > 0).any():
        return "NaN or Inf"
    known = rms[~np.isnan(rms)]
    if (known > FACTOR * middle).any():
        return "exploding"
    return "vanishing" if (known <= middle / FACTOR).any() else None


def _norms(found: Survey, places: Places, path: Path, called: str) -> Path:
    """l2 norms as a grid at the last step, with marks; beside it the lines of parameters."""
    last = found.by_step(found.l2)[:, -1]
    grid, verdicts = by_depth(found.names, places, last), judged(found, list(places))
    note = (
        f"▲ exploding, ▼ vanishing at some step: rms beyond {FACTOR:g} times its family's median; "
        "X: NaN or Inf"
    )
    if len(grid.rows) > ROWS:
        note += f"; the first {ROWS} of {len(grid.rows)} families"
        grid = Grid(grid.rows[:ROWS], grid.columns, grid.values[:ROWS])
    something = bool(np.isfinite(grid.values).any())
    drawn = figure(9.6, max(3.2, 1.4 + 0.16 * len(grid.rows)) if something else 1.6)
    left, right = drawn.subplots(1, 2, width_ratios=(1.1, 1))
    paint(left, grid, f"l2 norm at step {found.steps[-1]}", "layer")
    if something:
        _mark(left, grid, places, verdicts)
    _lines(right, grid)
    if right.get_legend_handles_labels()[0]:
        drawn.legend(loc="outside lower right", ncols=3, fontsize=6.5)
    else:
        say(right, "no norm is finite in two layers")
    return save(drawn, path, f"{called}, gradients by depth: {_spoken(verdicts)}", note)


_MARKS = {"exploding": "^", "vanishing": "v", "NaN or Inf": "X"}


def _mark(axes: Axes, grid: Grid, places: Places, verdicts: Mapping[str, str]) -> None:
    for name, verdict in verdicts.items():
        family, layer = places[name]
        if family in grid.rows:
            at = grid.columns.index(layer), grid.rows.index(family)
            axes.plot(*at, _MARKS[verdict], ms=5, color=RED, mec="white")


def _spoken(verdicts: Mapping[str, str]) -> str:
    found = list(verdicts.values())
    spoken = f"{found.count('exploding')} exploding, {found.count('vanishing')} vanishing"
    strange = found.count("NaN or Inf")
    return f"{spoken}, {strange} with NaN or Inf" if strange else spoken


def _lines(axes: Axes, grid: Grid) -> None:
    """Families that reach most layers, the steepest first."""
    whole = np.isfinite(grid.values) & (grid.values > 0)
    ratio = np.array([
        np.ptp(np.log(row[good])) if good.sum() > 1 else -1.0
        for row, good in zip(grid.values, whole, strict=True)
    ])  # fmt: skip
    # An output's gradient is the next input's: equal lines would hide each other.
    alike = {grid.values[at].tobytes(): at for at in np.argsort(ratio) if ratio[at] >= 0}
    for at, colour in zip(list(alike.values())[::-1][:_LINES], COLOURS, strict=False):
        label = labelled([grid.rows[at]], 44)[0]
        axes.semilogy(grid.columns, grid.values[at], "o-", ms=2.5, color=colour, label=label)
    axes.set(title="Norms that change most with depth", xlabel="layer", ylabel="l2 norm")
    few_ticks(axes)


def _by_step(found: Survey, names: Sequence[str], path: Path, called: str) -> Path:
    """The norm over all parameters, and the smallest, middle and largest of single gradients."""
    rows = [at for at, name in enumerate(found.names) if name.split("/")[1] == "grad"]
    what = "parameters"
    if not rows:
        wanted = set(names)
        rows, what = [at for at, name in enumerate(found.names) if name in wanted], "activations"
    norms = found.by_step(found.l2)[rows]
    strange = np.nansum(found.by_step(found.nonfinite.astype(np.float64))[rows], axis=0)
    drawn = figure(7.2, 3)
    axes = drawn.subplots()
    total = np.hypot.reduce(np.nan_to_num(norms, posinf=np.inf), axis=0)
    known = ~np.isnan(norms).all(axis=0)
    steps = np.array(found.steps)[known]
    low, middle, high = np.nanquantile(norms[:, known], (0, 0.5, 1), axis=0)
    axes.semilogy(steps, total[known], "o-", ms=3, color=BLUE, label=f"all {what} together")
    axes.semilogy(steps, middle, "-", color=ORANGE, label="median of single tensors")
    axes.fill_between(steps, low.clip(min=1e-300), high, color=SKY, alpha=0.3, lw=0,
                      label="smallest to largest")  # fmt: skip
    positive = low[low > 0]
    if positive.size:
        axes.set_ylim(bottom=float(positive.min()) / 3)
    for step in steps[strange[known] > 0]:
        axes.axvline(step, color=RED, lw=0.8)
    axes.set(xlabel="step", ylabel="l2 norm")
    few_ticks(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    note = "red: steps with NaN or Inf" if (strange > 0).any() else "no step has NaN or Inf"
    return save(drawn, path, f"{called}, gradient norms of {what} by step", note)


def _distributions(
    places: Places,
    values: Callable[[Sequence[str]], Mapping[str, Sample]],
    path: Path,
    called: str,
) -> Iterator[Path]:
    """Quantiles of the magnitudes by layer: of all parameters' gradients, and of the stream's."""
    groups = {
        "Gradients of parameters": [name for name in places if name.split("/")[1] == "grad"],
        "Gradients of the layers' outputs": [
            name for name in places if places[name][0] == "layer/backward/grad_output"
        ],
    }
    shown = {title: _magnitudes(values(names), places) for title, names in groups.items() if names}
    if not any(shown.values()):
        return
    drawn = figure(4.8 * len(shown), 3.2)
    for axes, (title, by_layer) in zip(
        np.atleast_1d(drawn.subplots(1, len(shown))), shown.items(), strict=True
    ):
        if by_layer:
            _fan(axes, by_layer)
            axes.set(title=title, xlabel="layer", ylabel="magnitude")
        else:
            say(axes, f"{title}: statistics only")
    title = f"{called}, distribution of gradients by depth, last step"
    yield save(drawn, path, title, "zeros are not drawn")


def _magnitudes(samples: Mapping[str, Sample], places: Places) -> dict[int, Floats]:
    found: dict[int, list[Floats]] = {}
    for name, sample in samples.items():
        sizes = np.abs(sample.finite)
        found.setdefault(places[name][1], []).append(sizes[sizes > 0])
    joined = {layer: np.concatenate(parts) for layer, parts in sorted(found.items())}
    return {layer: sizes for layer, sizes in joined.items() if sizes.size}


def _fan(axes: Axes, by_layer: Mapping[int, Floats]) -> None:
    layers = list(by_layer)
    cuts = np.array([np.quantile(sizes, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))
                     for sizes in by_layer.values()]).T  # fmt: skip
    axes.fill_between(layers, cuts[1], cuts[5], color=BLUE, alpha=0.2, lw=0, label="5 to 95 %")
    axes.fill_between(layers, cuts[2], cuts[4], color=BLUE, alpha=0.35, lw=0, label="25 to 75 %")
    axes.semilogy(layers, cuts[3], "o-", ms=2.5, color=BLUE, label="median")
    axes.semilogy(layers, cuts[6], "-", lw=0.8, color=RED, label="largest")
    few_ticks(axes)
    axes.legend(loc="best")
