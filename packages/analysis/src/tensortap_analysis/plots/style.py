"""One look for all pictures; drawn without a display, and without matplotlib's global state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator, NullLocator

Floats = npt.NDArray[np.float64]

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#777777",
)  # fmt: skip
"""Of the palette of Okabe and Ito, told apart under colour blindness too."""
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)

LOOK: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "figure.dpi": 130,
    # A path of a million points is drawn in pieces, or Agg refuses it.
    "agg.path.chunksize": 10000,
}


@contextmanager
def look() -> Iterator[None]:
    """Context within which figures have the look."""
    # Logarithmic colours that reach to 1e300 are inverted to infinity at their far end.
    with mpl.rc_context(LOOK), np.errstate(over="ignore"):
        yield


def figure(width: float, height: float) -> Figure:
    """A figure of so many inches that belongs to no window."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def save(drawn: Figure, path: Path, title: str, note: str = "") -> Path:
    """Write a PNG; `title` is bold at the top left, `note` small at the bottom left."""
    size = min(10.0, drawn.get_figwidth() * 116 / max(len(title), 1))
    # A name may hold a dollar sign, which would begin a formula.
    drawn.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=size, fontweight="bold")
    if note:
        drawn.supxlabel(note.replace("$", r"\$"), x=0.01, ha="left", fontsize=6.5, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    # savefig would lay out and draw everything twice.
    canvas: Any = drawn.canvas
    canvas.draw()
    imsave(path, np.asarray(canvas.buffer_rgba()), dpi=drawn.dpi)
    return path


def say(axes: Axes, reason: str) -> None:
    """In place of a drawing that cannot be made: why."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, ha="center", va="center", wrap=True, color=GREY)


def decades(values: Floats) -> bool:
    """Do the magnitudes span so much that only a logarithmic axis shows them?"""
    sizes = np.abs(values[values != 0])
    if sizes.size < 2:
        return False
    return bool(sizes.max() > 1000 * np.quantile(sizes, 0.05))


def linear_below(values: Floats) -> float:
    """Where a symmetric logarithmic axis becomes linear: most values are beyond it."""
    sizes = np.abs(values[values != 0])
    return float(np.quantile(sizes, 0.05)) if sizes.size else 1.0


def signed_norm(finite: Floats) -> Normalize:
    """Colours on both sides of 0, logarithmic where the values span decades."""
    largest = float(np.abs(finite).max()) or 1.0
    if not decades(finite):
        return Normalize(-largest, largest)
    linear = max(linear_below(finite), largest * 1e-6)
    return SymLogNorm(linear, vmin=-largest, vmax=largest)


def scale(axes: Axes, values: Floats, axis: str) -> list[float] | None:
    """Make `axis` (x or y) logarithmic on both sides of 0 where `values` ask for it.

    Returns edges of 100 bins of equal width on paper, or `None` for a linear axis.
    """
    if not decades(values):
        return None
    linear = linear_below(values)
    getattr(axes, f"set_{axis}scale")("symlog", linthresh=linear)
    ticks = _powers(linear, float(np.abs(values).max()))
    getattr(axes, f"set_{axis}ticks")(ticks)
    getattr(axes, f"{axis}axis").set_minor_locator(NullLocator())
    paper = getattr(axes, f"{axis}axis").get_transform()
    low, high = paper.transform(np.array([values.min(), values.max()]))
    edges: list[float] = np.unique(paper.inverted().transform(np.linspace(low, high, 101))).tolist()
    return edges


def few_ticks(axes: Axes, axis: str = "x", count: int = 6) -> None:
    """At most so many whole-number ticks."""
    getattr(axes, f"{axis}axis").set_major_locator(MaxNLocator(count, integer=True))


def count_scale(axes: Axes, *, room: float = 1.0) -> None:
    """A logarithmic axis of counts where they span more than a decade; `room` above for a legend.

    `room` is a share of the axis's height.
    """
    low, high = 0.5, axes.get_ylim()[1]
    if high > 20:
        axes.set_yscale("log")
        axes.set_ylim(low, low * (high / low) ** room)
    else:
        axes.set_ylim(0, high * room)


def colour_ticks(norm: Normalize) -> list[float] | None:
    """Ticks for logarithmic colours; `None` leaves them to matplotlib.

    On both sides of 0 its own overlap there, and over hundreds of decades they overflow.
    """
    if norm.vmin is None or norm.vmax is None:
        return None
    if isinstance(norm, SymLogNorm):
        return _powers(norm.linthresh, norm.vmax)
    if isinstance(norm, LogNorm) and norm.vmax / norm.vmin > 1e12:
        low, high = np.ceil(np.log10(norm.vmin)), np.floor(np.log10(norm.vmax))
        powers: list[float] = (10.0 ** np.linspace(low, high, 5).round()).tolist()
        return powers
    return None


def _powers(linear: float, largest: float) -> list[float]:
    top, low = np.floor(np.log10(largest)), np.ceil(np.log10(linear))
    powers = 10.0 ** np.unique(np.linspace(low + (top - low) / 3, top, 3).round())
    return [*(-powers[::-1]).tolist(), 0.0, *powers.tolist()]


def labelled(labels: Sequence[str], most: int) -> list[str]:
    """Labels for an axis, cut in the middle to at most so many characters."""
    half = (most - 1) // 2
    cut = (text if len(text) <= most else f"{text[:half]}…{text[-half:]}" for text in labels)
    return [text.replace("$", r"\$") for text in cut]
