"""A picture of drift over checkpoints: norms, changes and condition numbers of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from tensortap_analysis.plots.style import COLOURS, GREY, figure, labelled, look, save, say
from tensortap_analysis.weights.drift.tracking import Drift
from tensortap_analysis.weights.drift.trend import (
    Line,
    changes,
    checkpoint_names,
    conditions,
    layers_of,
    most_changed,
    norms,
)

_NAMED = 6
_LONGEST = 40


def draw_drift(steps: Sequence[Drift], path: Path) -> Path:
    """Write a PNG. Layers that broke, or changed most in one step, are named; others are grey."""
    layers = layers_of(steps)
    named = most_changed(steps, layers)[:_NAMED]
    colours = dict(zip(named, COLOURS, strict=False))
    panels = (
        ("norm / norm of the first that is not 0", norms, 1.0),
        ("change of each step / norm before", changes, None),
        ("condition number", conditions, None),
    )
    with look():
        drawn = figure(13, 4.2)
        for axes, (title, lines, level) in zip(drawn.subplots(1, 3), panels, strict=True):
            _panel(axes, {layer: lines(steps, layer) for layer in layers}, colours, steps)
            axes.set_title(title)
            if level is not None:
                axes.axhline(level, color="#000000", lw=0.6, ls=":")
        handles, names = drawn.axes[1].get_legend_handles_labels()
        if handles:
            drawn.legend(handles, names, loc="outside lower center", ncols=3)
        title = f"Drift of {len(layers)} weights over {len(steps) + 1} checkpoints"
        return save(drawn, path, title, _broken(steps))


def _panel(
    axes: Axes, lines: Mapping[str, Line], colours: Mapping[str, str], steps: Sequence[Drift]
) -> None:
    """Logarithmic; the named layers are drawn last, over the others."""
    shown = {layer: [point for point in line if _drawable(point[1])]
             for layer, line in lines.items()}  # fmt: skip
    if not any(shown.values()):
        say(axes, "not measured")
        return
    for layer in sorted(shown, key=lambda layer: layer in colours):
        label = labelled([layer], _LONGEST)[0] if layer in colours else None
        axes.plot(
            [at for at, _ in shown[layer]], [value for _, value in shown[layer]], marker=".", ms=4,
            color=colours.get(layer, GREY), alpha=1 if layer in colours else 0.3, label=label,
        )  # fmt: skip
    axes.set_yscale("log")
    names = checkpoint_names(steps)
    few = range(0, len(names), max(1, len(names) // 8))
    axes.set_xticks(list(few), labelled([names[at] for at in few], 16), rotation=30, ha="right")
    axes.xaxis.set_minor_locator(NullLocator())


def _broken(steps: Sequence[Drift]) -> str:
    """Which lines end, and why."""
    found = {
        layer: name for step, name in zip(steps, checkpoint_names(steps)[1:], strict=True)
        for layer, row in step.layers.items() if row["not_finite_after"]
    }  # fmt: skip
    if not found:
        return ""
    layer, name = next(iter(found.items()))
    more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
    return f"NaN or infinite, and not drawn: {layer} in {name}{more}."


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0
