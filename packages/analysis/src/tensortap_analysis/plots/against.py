"""comparisons/: which tensors are set against another run, or against their images in formats."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tensortap.store import Run
from tensortap_analysis.moments import Captured
from tensortap_analysis.plots import comparisons
from tensortap_analysis.plots.drawing import Drawing, title
from tensortap_analysis.plots.pairs import pair
from tensortap_analysis.plots.samples import ordinal
from tensortap_analysis.plots.selecting import at_moments
from tensortap_analysis.whatif.judging import contraction_axis

_PAIRS, _ALL = 1 << 14, 1 << 20
"""Values of each tensor in the search for the largest error, and in its own picture."""


def draw_errors(drawing: Drawing, against: Run) -> dict[str, float]:
    """Relative L2 error of every tensor that both runs have values of, and their picture."""
    drawing.progress("errors against the reference")
    done, run = drawing.done, drawing.run
    theirs = at_moments(against, [(n, t.moment.step) for n, t in drawing.latest.items()])
    missing = [name for name in drawing.latest if name not in theirs]
    found: dict[str, float] = {}
    for name, tensor in drawing.latest.items():
        if name in theirs and tensor.values == theirs[name].values == "full":
            with drawing.noted(name):
                found[name] = pair(theirs[name], tensor, _PAIRS).relative_l2
    if missing:
        done.left_out.append(
            f"{missing[0]} and {len(missing) - 1:,} more: {against.path} has no such tensor at "
            "that step"
        )
    if not found:
        done.left_out.append("comparisons/: no tensor has values in both runs")
        return found
    path = drawing.out / "comparisons" / "overview.png"
    note = f"of up to {_PAIRS:,} values of each tensor, evenly spaced"
    heading = f"{run.path.name} against {against.path.name}"
    done.files.append(comparisons.overview(found, path, heading, note))
    return found


def draw_compared(drawing: Drawing, against: Run, tensors: Mapping[str, Captured]) -> None:
    """Tensors against those of the same name and step in another run."""
    theirs = at_moments(against, [(n, t.moment.step) for n, t in tensors.items()])
    for name, tensor in tensors.items():
        if name not in theirs or not (tensor.values == theirs[name].values == "full"):
            continue
        drawing.progress(name)
        with drawing.noted(name):
            both = pair(theirs[name], tensor, _ALL)
            path = drawing.path("comparisons", tensor)
            drawing.done.files.append(comparisons.of_runs(both, path, title(tensor)))


def draw_rounded(drawing: Drawing, tensors: Mapping[str, Captured]) -> None:
    """Without another run: what number formats do to the same tensors."""
    for name, tensor in tensors.items():
        record = tensor.first()
        dtype = getattr(torch, record.dtype, torch.int64)
        if tensor.values != "full" or not dtype.is_floating_point:
            continue
        drawing.progress(name)
        with drawing.noted(name):
            logical = tensor.open()
            if not math.prod(logical.shape):
                continue
            axis = contraction_axis(record, len(logical.shape))
            values, note = _rows(logical.tensor(), axis)
            path = drawing.path("comparisons", tensor, "formats")
            drawing.done.files.append(comparisons.of_formats(values, path, title(tensor), note))


def _rows(tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, str]:
    """[rows, contraction axis] in float32, at most about a million values, and what they are."""
    wide = tensor.reshape(1) if not tensor.ndim else tensor
    rows = wide.movedim(axis, -1).reshape(-1, wide.shape[axis])
    every = max(1, rows.numel() >> 18)
    note = f"every {ordinal(every)} row along the contraction axis" if every > 1 else "all values"
    return rows[::every].to(torch.float32), note
