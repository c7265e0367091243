"""comparisons/: a tensor against another run's, or against its images in number formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from tensortap_analysis.captured.words import family_of, layer_of
from tensortap_analysis.metrics import measure_tensors
from tensortap_analysis.plots.pairs import Pair
from tensortap_analysis.plots.style import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    RED,
    Floats,
    count_scale,
    few_ticks,
    figure,
    save,
    say,
    scale,
)
from tensortap_analysis.whatif.rounding import Values as Rounded
from tensortap_analysis.whatif.rounding import codec_of, tally

FORMATS = ("hifp8", "mxfp8", "mxfp4", "nvfp4", "int8")


def of_runs(pair: Pair, path: Path, title: str) -> Path:
    """Value against value, both histograms, and the histogram of the differences."""
    drawn = figure(10.5, 3.3)
    left, middle, right = drawn.subplots(1, 3)
    ref, run = pair.both
    if not ref.size:
        for axes in (left, middle, right):
            say(axes, "no value is finite in both")
        return save(drawn, path, title, pair.note)
    _against(left, ref, run, pair.names)
    _two_histograms(middle, ref, run, pair.names)
    _differences(right, run - ref)
    strange = pair.ref.size - ref.size
    note = f"{pair.note}; {strange:,} of them NaN or Inf in a run" if strange else pair.note
    return save(drawn, path, title, f"{_metrics(ref, run)}\n{note}")


def _metrics(ref: Floats, run: Floats) -> str:
    found = measure_tensors(torch.from_numpy(ref), torch.from_numpy(run))
    numbers = (
        ("MSE", found.mse), ("MAE", found.mae), ("max |d|", found.max_abs),
        ("relative L2", found.relative_l2), ("cosine", found.cosine),
        ("correlation", found.correlation), ("SQNR dB", found.sqnr_db),
    )  # fmt: skip
    return "   ".join(f"{word} {number:.4g}" for word, number in numbers if number is not None)


def _against(axes: Axes, ref: Floats, run: Floats, names: tuple[str, str]) -> None:
    low, high = min(ref.min(), run.min()), max(ref.max(), run.max())
    if low == high:
        say(axes, f"both constant: {low:.4g}")
        return
    grid = np.linspace(low, high, 151)
    counts, _, _ = np.histogram2d(run, ref, bins=(grid, grid))
    drawn = axes.pcolormesh(
        grid, grid, np.where(counts, counts, np.nan), norm=LogNorm(), cmap="viridis",
        rasterized=True,
    )  # fmt: skip
    axes.plot([low, high], [low, high], lw=0.7, color=RED)
    axes.set(title="Value against value", xlabel=names[0], ylabel=names[1])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(scilimits=(-2, 4))
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(drawn, ax=axes, pad=0.01, label="values")


def _two_histograms(axes: Axes, ref: Floats, run: Floats, names: tuple[str, str]) -> None:
    both = np.concatenate([ref, run])
    edges = scale(axes, both, "x")
    if edges is None:
        edges = np.histogram_bin_edges(both, 100).tolist()
    for values, name, colour in zip((ref, run), names, (BLUE, ORANGE), strict=True):
        axes.hist(values, bins=edges, histtype="step", color=colour, label=name)
    count_scale(axes)
    axes.set(title="Both histograms", xlabel="value", ylabel="values in bin")
    _legend_above(axes)


def _differences(axes: Axes, difference: Floats) -> None:
    if not difference.any():
        say(axes, "no difference")
        return
    edges = scale(axes, difference, "x")
    axes.hist(difference, bins=100 if edges is None else edges, color=GREY)
    count_scale(axes)
    middle, far = np.quantile(np.abs(difference), (0.5, 0.99))
    for at, word, style in ((middle, "median |d|", "--"), (far, "99 % of |d|", ":")):
        axes.axvline(at, color=RED, lw=0.8, ls=style, label=f"{word} {at:.3g}")
        axes.axvline(-at, color=RED, lw=0.8, ls=style)
    axes.set(title="Differences", xlabel="difference", ylabel="values in bin")
    _legend_above(axes)


def _legend_above(axes: Axes) -> None:
    """Between title and drawing, where it hides no line."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, borderaxespad=0.2)
    axes.set_title(axes.get_title(), pad=16)


def of_formats(values: torch.Tensor, path: Path, title: str, note: str) -> Path:
    """The errors of rounding `values` [rows, contraction axis] to each format."""
    drawn = figure(9.6, 3.3)
    left, right = drawn.subplots(1, 2, width_ratios=(1.5, 1))
    errors, names, sqnr = [], [], []
    for name in FORMATS:
        codec = codec_of(name)
        rounded = codec.dequantize(codec.quantize(values)).to(torch.float64)
        error = (rounded - values).numpy().reshape(-1)
        errors.append(error[np.isfinite(error)])
        decibel = tally(codec, Rounded(values)).sqnr_db
        sqnr.append(math.nan if decibel is None else decibel)
        names.append(name)
    _error_histograms(left, errors, names, sqnr)
    _bars(right, names, sqnr)
    return save(drawn, path, title, f"errors of rounding as it was captured; {note}")


def _error_histograms(
    axes: Axes, errors: Sequence[Floats], names: Sequence[str], sqnr: Sequence[float]
) -> None:
    everything = np.concatenate(errors)
    if not everything.any():
        say(axes, "no format changes a value")
        return
    edges = scale(axes, everything, "x")
    if edges is None:
        edges = np.histogram_bin_edges(everything, 100).tolist()
    for error, name, decibel, colour in zip(errors, names, sqnr, COLOURS, strict=False):
        axes.hist(error, bins=edges, histtype="step", color=colour,
                  label=f"{name} ({decibel:.1f} dB)")  # fmt: skip
    count_scale(axes, room=1.3)
    axes.set(title="Histogram of the errors", xlabel="format - captured", ylabel="values in bin")
    axes.legend(loc="upper center", ncols=3)


def _bars(axes: Axes, names: Sequence[str], sqnr: Sequence[float]) -> None:
    places = np.arange(len(names))[::-1]
    shown = [0.0 if not math.isfinite(value) else value for value in sqnr]
    axes.barh(places, shown, color=COLOURS[: len(names)], height=0.65)
    for place, value, size in zip(places, sqnr, shown, strict=True):
        axes.text(max(size, 0), place, f" {value:.1f}", va="center", fontsize=7)
    axes.set_yticks(places, names)
    axes.axvline(0, color=GREY, lw=0.6)
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    axes.set(title="Signal over quantisation noise", xlabel="SQNR, dB (more is better)")


def overview(errors: Mapping[str, float], path: Path, title: str, note: str) -> Path:
    """Relative L2 errors in execution order, and by depth for the families that err most."""
    drawn = figure(10.5, 3.6)
    left, right = drawn.subplots(1, 2)
    finite = [value for value in errors.values() if 0 < value < math.inf]
    equal = sum(not value for value in errors.values())
    note = f"{note}; {equal:,} tensors without any difference are not drawn" if equal else note
    if equal == len(errors):
        for axes in (left, right):
            say(axes, "no tensor differs")
        return save(drawn, path, title, note)
    top = 3 * max(finite, default=1.0)
    numbers = np.array([value if 0 < value < math.inf else np.nan for value in errors.values()])
    left.semilogy(numbers, ".", ms=3, color=BLUE)
    infinite = [at for at, value in enumerate(errors.values()) if math.isinf(value)]
    if infinite:
        left.semilogy(infinite, [top] * len(infinite), "x", color=RED,
                      label="NaN or Inf in one run only")  # fmt: skip
        left.legend()
    left.set(title=f"{len(errors):,} tensors", xlabel="tensor, in execution order",
             ylabel="relative L2 error", xlim=(-1, len(errors)))  # fmt: skip
    few_ticks(left)
    _by_depth(right, errors, top)
    return save(drawn, path, title, note)


def _by_depth(axes: Axes, errors: Mapping[str, float], top: float) -> None:
    """Lines of the families that differ most; equal ones would hide each other."""
    families: dict[str, dict[int, float]] = {}
    for name, value in errors.items():
        layer = layer_of(name)
        if layer is not None and value > 0:
            families.setdefault(family_of(name), {})[layer] = value
    ranked = sorted(families, key=lambda family: -max(families[family].values()))
    ranked.sort(key=lambda family: family != "layer/forward/output")
    if not ranked:
        say(axes, "no tensor in a layer differs")
        return
    alike = {tuple(sorted(families[family].items())): family for family in reversed(ranked)}
    for family, colour in zip([f for f in ranked if f in alike.values()], COLOURS, strict=False):
        layers = sorted(families[family])
        values = np.array([families[family][layer] for layer in layers])
        axes.semilogy(layers, np.where(np.isinf(values), np.nan, values), "o-", ms=2.5,
                      color=colour, label=family)  # fmt: skip
        gone = [layer for layer, value in zip(layers, values, strict=True) if np.isinf(value)]
        axes.semilogy(gone, [top] * len(gone), "x", color=colour)
    axes.set(title="By depth: the residual stream and what differs most", xlabel="layer",
             ylabel="relative L2 error")  # fmt: skip
    few_ticks(axes)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
