"""What is to say about checkpoints as a whole: their order, and whether they are of one model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tensortap_analysis.weights.drift.tracking import Drift

_NUMBER = re.compile(r"\d+")
_FEW = 0.5
"""Share of the weights, below which checkpoints have little in common."""


def notices(steps: Sequence[Drift]) -> list[str]:
    """Sentences; none where checkpoints of one model follow each other."""
    return [*_order([steps[0].before, *(step.after for step in steps)]), *_of_steps(steps)]


def _order(labels: Sequence[str]) -> Iterator[str]:
    """Names that differ in numbers alone, which do not grow: `step300 step100`."""
    if len({_NUMBER.sub("#", label) for label in labels}) > 1:
        return
    numbers = [[int(number) for number in _NUMBER.findall(label)] for label in labels]
    if numbers != sorted(numbers):
        yield (
            f"The checkpoints are not in the order of their numbers ({', '.join(labels)}): each is "
            "compared with the one that was named before it."
        )


def _of_steps(steps: Sequence[Drift]) -> Iterator[str]:
    for step in steps:
        both = f"{step.before} and {step.after}"
        count = len(step.layers)
        every = count + len({one.name for one in step.skipped})
        if count < _FEW * every:
            yield (
                f"Only {count:,} of {every:,} weights are in both {both} with one name and shape; "
                "are they of one model?"
            )
        elif all(row["unchanged"] == 1 for row in step.layers.values()):
            yield f"Not one value differs between {both}: are they the same checkpoint?"
