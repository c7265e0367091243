"""tensor_stats.txt: how many tensors and values there are, their range and moments, and shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from tensortap.names import TensorName
from tensortap.nonfinite import first_nonfinite
from tensortap.store import Run
from tensortap_analysis.captured.words import kind_of
from tensortap_analysis.plots.style import Floats
from tensortap_analysis.plots.survey import Survey

Shares = Mapping[str, Counter[str]]


def shares(found: Survey, formats: Mapping[str, str]) -> tuple[Shares, Shares]:
    """(values, tensors) by format, layer type and phase; a tensor counts once at each step."""
    values: dict[str, Counter[str]] = {
        word: Counter() for word in ("format", "layer type", "phase")
    }
    tensors: dict[str, Counter[str]] = {word: Counter() for word in values}
    for at, count in zip(found.name.tolist(), found.count.tolist(), strict=True):
        name = TensorName.parse(found.names[at])
        words = (formats.get(found.names[at], "unknown"), kind_of(name), name.phase)
        for what, word in zip(values, words, strict=True):
            values[what][word] += count
            tensors[what][word] += 1
    return values, tensors


def text(called: str, run: Run, found: Survey, by_values: Shares, by_tensors: Shares) -> str:
    """The page; `called` is what the run is called."""
    count = int(found.count.sum())
    strange = int(found.nonfinite.sum())
    lines = [
        f"run                {called}",
        f"model              {run.info.model_class or 'unknown'}",
        f"tensors            {len(found.names):,} names, {len(found.name):,} at "
        f"{len(found.steps):,} step(s)",
        f"values             {count:,}",
        f"NaN or Inf         {strange:,}{_first(run, found) if strange else ''}",
        f"zeros              {_share(int(found.zero.sum()), count)}",
        *_moments(found),
    ]
    for what, counts in by_values.items():
        lines += ["", f"by {what}"]
        total = by_tensors[what].total()
        for word, values in counts.most_common():
            tensors = by_tensors[what][word]
            lines.append(
                f"  {word:<16} {_share(tensors, total):>22} tensors "
                f"{_share(values, count):>30} values"
            )
    return "\n".join(lines) + "\n"


def _first(run: Run, found: Survey) -> str:
    """Where they begin."""
    first = first_nonfinite(run, step=found.steps[0] if len(found.steps) == 1 else None)
    return "" if first is None else f", first in {first}"


def _moments(found: Survey) -> list[str]:
    """Over finite values of floating-point tensors; the spread of the means is deviation too."""
    found = found.floating
    finite: Floats = (found.count - found.nonfinite).astype(np.float64)
    known = finite > 0
    if not known.any():
        return ["range, mean, std   no finite value"]
    weight = finite[known] / finite.sum()
    mean = float((weight * found.mean[known]).sum())
    apart = np.hypot(found.std[known], found.mean[known] - mean)
    std = math.hypot(*(np.sqrt(weight) * apart))
    low, high = float(np.nanmin(found.min)), float(np.nanmax(found.max))
    return [
        f"range              {low:.6g} .. {high:.6g}",
        f"mean               {mean:.6g}",
        f"std                {std:.6g}",
    ]


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({100 * part / max(whole, 1):.1f} %)"
