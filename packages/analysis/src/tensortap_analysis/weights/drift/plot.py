"""A picture of drift over checkpoints: norms, changes and condition numbers of every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from tensortap_analysis.plots.style import COLOURS, GREY, figure, labelled, look, save, say
from tensortap_analysis.weights.drift.tracking import Drift

_NAMED = 6
_LONGEST = 40
_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
Line = Sequence[tuple[int, float]]


def draw_drift(steps: Sequence[Drift], path: Path) -> Path:
    """Write a PNG. The layers that changed most in one step are named, the others are grey."""
    layers = list(dict.fromkeys(layer for step in steps for layer in step.layers))
    named = sorted(layers, key=lambda layer: -_largest_change(steps, layer))[:_NAMED]
    colours = dict(zip(named, COLOURS, strict=False))
    panels = (
        ("norm / norm of the first", _norms, 1.0),
        ("change of each step / norm before", _changes, None),
        ("condition number", _conditions, None),
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
        return save(drawn, path, title)


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
    names = [_name(one) for one in (steps[0].before, *(step.after for step in steps))]
    few = range(0, len(names), max(1, len(names) // 8))
    axes.set_xticks(list(few), labelled([names[at] for at in few], 16), rotation=30, ha="right")
    axes.xaxis.set_minor_locator(NullLocator())


def _name(label: str) -> str:
    """The last folder, or a file without what says its kind."""
    path = Path(label)
    return (path.stem if path.suffix in _FILES else path.name) or label


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _largest_change(steps: Sequence[Drift], layer: str) -> float:
    found = [step.layers.get(layer, {}).get("relative_change") for step in steps]
    return max((value for value in found if value is not None), default=0.0)


def _norms(steps: Sequence[Drift], layer: str) -> Line:
    points = _both_sides(steps, layer, "l2_before", "l2_after")
    first = points[0][1] if points else 0.0
    return [(at, value / first) for at, value in points] if first else []


def _changes(steps: Sequence[Drift], layer: str) -> Line:
    rows = [(at + 1, step.layers.get(layer, {})) for at, step in enumerate(steps)]
    found = [(at, row.get("relative_change")) for at, row in rows]
    return [(at, value) for at, value in found if value is not None]


def _conditions(steps: Sequence[Drift], layer: str) -> Line:
    return _both_sides(steps, layer, "condition_before", "condition_after")


def _both_sides(steps: Sequence[Drift], layer: str, before: str, after: str) -> Line:
    found: dict[int, Any] = {}
    for at, step in enumerate(steps):
        row = step.layers.get(layer, {})
        found.setdefault(at, row.get(before))
        found[at + 1] = row.get(after)
    return [(at, value) for at, value in found.items() if value is not None]
