"""Whether a noise run can be believed: what deserves a warning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from tensortap_analysis.captured.facts import RunFacts
from tensortap_analysis.judging.noise import usable
from tensortap_analysis.judging.rounding import expected
from tensortap_analysis.pairs.pair import Pair

_FAR, _LARGE = 3.0, 0.05
"""A noise run is far from the reference where the median of its errors is so many times what
rounding to its dtypes explains, and this large: a run may be rounded more coarsely than the dtype
that it is stored in, and is noise all the same."""


def noise_warnings(
    ref: RunFacts, run: RunFacts, noise: RunFacts, pairs: Sequence[Pair]
) -> Iterator[str]:
    """What is wrong with a noise run; `pairs` are those of the run that is judged by it."""
    beside = [pair.noise for pair in pairs if pair.noise is not None]
    if pairs and not beside:
        yield f"The noise run {noise.path} has none of the tensors; rounding is estimated instead."
        return
    if noise.model and ref.model and noise.model != ref.model:
        yield f"The noise run {noise.path} is of another model: {noise.model}, REF is {ref.model}."
    if beside and all(one.error == 0 for one in beside):
        yield (
            f"The noise run {noise.path} equals {ref.path} in every tensor: it says nothing about "
            "noise. Only one rounding of its dtype is accepted."
        )
    elif _is_the_run(pairs):
        yield (
            f"{run.path} and the noise run {noise.path} are the same in every tensor: by "
            "definition it agrees, whatever its errors are."
        )
    yield from _unusable(pairs)
    yield from _far_away(noise, beside)


def _is_the_run(pairs: Sequence[Pair]) -> bool:
    """Is each error that of the noise run, to the last digit?"""
    both = [(pair, pair.noise) for pair in pairs if pair.noise is not None]
    apart = [pair for pair, _ in both if pair.error > 0]
    same = all((pair.metrics, pair.bounds) == (noise.metrics, noise.bounds) for pair, noise in both)
    return bool(apart) and same


def _unusable(pairs: Sequence[Pair]) -> Iterator[str]:
    """Tensors whose limits are estimated although there is a noise run, and why."""
    missing = sum(pair.noise is None for pair in pairs)
    broken = sum(pair.noise is not None and pair.noise.nonfinite for pair in pairs)
    useless = sum(pair.noise is not None and usable(pair) is None for pair in pairs) - broken
    if missing:
        yield f"The noise run lacks {missing:,} of {len(pairs):,} tensors; theirs is estimated."
    if broken:
        yield (
            f"The noise run has NaN or infinity of its own in {broken:,} of {len(pairs):,} "
            "tensors; theirs is estimated."
        )
    if useless:
        yield (
            f"Of {useless:,} of {len(pairs):,} tensors the noise run, or the run, has statistics "
            "only, which do not compare with values; their noise is estimated."
        )


def _far_away(noise: RunFacts, beside: Sequence[Pair]) -> Iterator[str]:
    """Errors far beyond rounding may be meant, or REF and RUN are swapped."""
    both = zip(beside, expected(beside), strict=True)
    known = [(p.error, floor) for p, floor in both if floor and 0 < p.error < math.inf]
    if not known:
        return
    times = median(error / floor for error, floor in known)
    size = median(error for error, _ in known)
    if times > _FAR and size > _LARGE:
        yield (
            f"The noise run {noise.path} differs from REF by {size:.2g} (median relative error), "
            f"{times:.3g} times what rounding explains, and errors of that size are accepted: is "
            "REF the reference, and the noise run only noise?"
        )
