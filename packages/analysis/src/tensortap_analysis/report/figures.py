"""Charts: plotly figures as plain JSON, drawn by the page in its own colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tensortap_analysis.report.markup import Html, data_block, join, tag, text

COLOURS = ("#2f7ed8", "#e07b00", "#00966e", "#b8529a", "#8a63d2", "#7d8791")
"""Runs, or phases of one run; readable on light and dark, told apart under colour blindness."""
SCALE = "Cividis"
"""A colour scale that reads the same under colour blindness."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with what it shows, and what it leaves out, in words."""

    name: str
    title: str
    says: str
    figure: go.Figure

    def markup(self) -> Html:
        """The figure's place in the page, and its data."""
        place = tag(
            "div", class_="chart", id=self.name, role="img", aria_label=self.title,
            style=f"height:{int(self.figure.layout.height)}px",
        )  # fmt: skip
        data = data_block(f"{self.name}-data", self.figure.to_json())
        title, says = tag("h3", self.title), tag("p", self.says, class_="says")
        return tag("figure", join((title, says, place, data)))


def figure(traces: Iterable[Any], x: str, y: str, *, height: int = 420, **layout: Any) -> go.Figure:
    """Traces on axes with these titles."""
    axes = {
        "xaxis": {"title": {"text": x}, "automargin": True} | layout.pop("xaxis", {}),
        "yaxis": {"title": {"text": y}, "automargin": True} | layout.pop("yaxis", {}),
    }
    # Below the axis: above the drawing it would run under the buttons.
    legend = {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0}
    margin = {"l": 60, "r": 20, "t": 30, "b": 50}
    return go.Figure(
        list(traces),
        {
            "template": "none", "height": height, "legend": legend, "margin": margin,
            "hovermode": "closest", **axes, **layout,
        },
    )  # fmt: skip


def logarithmic(values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis that is at least a decade wide; plotly would zoom into equal values."""
    logs = [math.log10(x) for x in values if 0 < x < math.inf]
    axis: dict[str, Any] = {"type": "log", "exponentformat": "power"}
    if logs:
        low, high = min(logs), max(logs)
        room = max(0.05 * (high - low), (1 - (high - low)) / 2, 0.1)
        axis |= {"range": [low - room, high + room]}
        wide = high - low + 2 * room
        # "D2" labels 2 and 5 as well: of few decades it would label hardly one.
        axis["dtick"] = "D2" if wide < 3 else max(1, math.ceil((high - low) / 8))
    return axis


def whole(numbers: Iterable[int]) -> dict[str, Any]:
    """An axis of whole numbers: never more than one mark for each."""
    every = set(numbers) or {0}
    apart = max(every) - min(every)
    return {"dtick": max(1, math.ceil(apart / 16)), "tick0": min(every), "tickformat": "d"}


def top(values: Iterable[float]) -> float:
    """Where infinity is drawn on a logarithmic axis: above all of these values."""
    return 10 * max((x for x in values if 0 < x < math.inf), default=0.1)


def drawn(values: Sequence[float], infinity: float) -> list[float | None]:
    """What a logarithmic axis can show: nothing for 0 and NaN, `infinity` in its place."""
    return [None if not x > 0 else min(x, infinity) for x in values]


def hover(words: Iterable[str]) -> list[str]:
    """Texts of marks, escaped: plotly reads tags and entities, but not that of a quote."""
    return [str(text(word, quote=False)).replace("\n", "<br>") for word in words]


def short(value: float | None) -> str:
    """Four digits, `-` for what is not known."""
    return "-" if value is None else f"{value:.4g}"
