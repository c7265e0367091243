"""How alike two distributions of errors are."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tensortap_analysis.metrics.result import Metrics, Octaves


def bhattacharyya(a: Metrics, b: Metrics, *, relative: bool = False) -> float | None:
    """Bhattacharyya coefficient of the error distributions of two pairs, 0 to 1.

    The sum of sqrt(p * q) over bins of one octave for each sign, and one for zero; of d, or with
    `relative` of d / (|ref| + 1e-8). `None` where one of the pairs compared nothing. With few
    values it is less than 1 by chance: about occupied bins / (8 n), for n values in each.
    """
    one, two = (
        metrics.error_histogram.relative if relative else metrics.error_histogram.absolute
        for metrics in (a, b)
    )
    if not a.compared or not b.compared:
        return None
    products = math.fsum(math.sqrt(p) * math.sqrt(q) for p, q in _shared(one, two))
    return min(1.0, products / (math.sqrt(a.compared) * math.sqrt(b.compared)))


def _shared(one: Octaves, two: Octaves) -> Iterator[tuple[int, int]]:
    """Counts of bins that occur in both."""
    yield one.zero, two.zero
    for first, second in ((one.negative, two.negative), (one.positive, two.positive)):
        yield from ((first[e], second[e]) for e in first.keys() & second.keys())
