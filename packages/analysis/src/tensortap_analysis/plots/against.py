"""comparisons/: which tensors are set against another run, or against their images in formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tensortap.store import Run
from tensortap.tables import grouped
from tensortap_analysis.captured.moments import Captured, Catalogue, catalogue
from tensortap_analysis.measuring.examining import examine
from tensortap_analysis.pairs.pairing import Match
from tensortap_analysis.pairs.pairing import pair as paired
from tensortap_analysis.pairs.reasons import NotComparable
from tensortap_analysis.plots import comparisons
from tensortap_analysis.plots.drawing import Drawing, title
from tensortap_analysis.plots.pairs import pair
from tensortap_analysis.plots.samples import ordinal
from tensortap_analysis.whatif.judging import contraction_axis

_PAIRS, _ALL = 1 << 14, 1 << 20
"""Values of each tensor in the search for the largest error, and in its own picture."""


@dataclass(frozen=True, slots=True)
class Facing:
    """A tensor of the run and its counterpart: `name` is that of both, a part's where either side
    has it fused, and `of` that of the run's tensor it was asked for.
    """

    name: str
    of: str
    ref: Captured
    run: Captured
    examine: Callable[[], float]
    """The relative error by statistics or samples."""

    @property
    def whole(self) -> bool:
        """Are there all values on both sides?"""
        return self.ref.values == self.run.values == "full"


def facing(run: Run, against: Run, tensors: Mapping[str, Captured]) -> list[Facing]:
    """What the reference has of these tensors, paired as `compare` does."""
    asked = {tensor.moment: name for name, tensor in tensors.items() if tensor.part is None}
    parts = {(tensor.moment, tensor.part): name for name, tensor in tensors.items()}
    found = []
    for step in sorted({tensor.moment.step for tensor in tensors.values()}):
        theirs, mine = catalogue(against, step=step), catalogue(run, step=step)
        for match in paired(theirs, mine).matches:
            of = parts.get((match.other, match.name)) or asked.get(match.other)
            if of is not None:
                ref = theirs.moments[match.ref].as_part(match.name)
                other = mine.moments[match.other].as_part(match.name)
                found.append(
                    Facing(match.name, of, ref, other, partial(_error, match, theirs, mine))
                )
    return found


def _error(match: Match, ref: Catalogue, other: Catalogue) -> float:
    return examine(match, ref, other).error


def draw_errors(drawing: Drawing, against: Run) -> dict[str, float]:
    """Relative L2 error of every tensor that both runs have, and their picture.

    Of fused tensors it is that of the part that errs most.
    """
    drawing.progress("errors against the reference")
    done, run = drawing.done, drawing.run
    wanted = {name: drawing.latest[name] for name in drawing.found.floating.present}
    both = facing(run, against, wanted)
    known = {one.of for one in both}
    absent = [name for name in wanted if name not in known]
    reasons: list[tuple[str, str, int]] = []
    shown: dict[str, float] = {}
    found: dict[str, float] = {}
    estimated = 0
    for one in both:
        with drawing.noted(one.name):
            try:
                error = pair(one.ref, one.run, _PAIRS).relative_l2 if one.whole else one.examine()
            except NotComparable as reason:
                reasons.append((one.name, str(reason), 1))
                continue
            shown[one.name] = error
            found[one.of] = max(error, found.get(one.of, 0.0))
            estimated += not one.whole
    done.left_out += grouped(reasons)
    if not shown:
        done.left_out.append(f"comparisons/: nothing in common with {against.path} to compare")
        return found
    if absent:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        done.left_out.append(f"{absent[0]}{more}: {against.path} has no such tensor at that step")
    path = drawing.out / "comparisons" / "overview.png"
    note = f"of up to {_PAIRS:,} values of each tensor, evenly spaced"
    if estimated:
        note += f"; at least, of {estimated:,} tensors by statistics or samples"
    heading = f"{run.path.name} against {against.path.name}"
    done.files.append(comparisons.overview(shown, path, heading, note))
    return found


def draw_compared(drawing: Drawing, against: Run, tensors: Mapping[str, Captured]) -> None:
    """Tensors against those of the same name and step in another run."""
    for one in facing(drawing.run, against, tensors):
        if not one.whole:
            continue
        drawing.progress(one.name)
        with drawing.noted(one.name):
            try:
                both = pair(one.ref, one.run, _ALL)
            except NotComparable as reason:
                drawing.done.left_out.append(f"{one.name}: {reason}")
                continue
            path = drawing.path("comparisons", one.run)
            drawing.done.files.append(comparisons.of_runs(both, path, title(one.run)))


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
