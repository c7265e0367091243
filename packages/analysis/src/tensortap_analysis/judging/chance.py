"""How far two samples of one distribution are apart by chance: at most so, 999 times in 1000."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from statistics import NormalDist

from tensortap_analysis.metrics import Metrics

FEW = 32
"""Of fewer values the sizes tell nothing about how they are spread."""
_NORMAL = NormalDist().inv_cdf(0.999)
_STUDENT = {1: 318.309, 2: 22.327}
"""Student's t for 0.999, where the expansion in 1/n is too far off (from 3 on it is within 3 %)."""


@lru_cache(maxsize=4096)
def rms_ratio(values: int) -> float:
    """The ratio of the RMS of two times so many normal errors of one kind.

    Its square is F-distributed with equal degrees of freedom n, and then
    sqrt(n) / 2 * (ratio - 1 / ratio) is Student's t of n (Cacoullos, 1965).
    """
    if values < 1:
        return math.inf
    t = _student(values) / math.sqrt(values)
    return t + math.sqrt(1 + t * t)


def _student(n: int) -> float:
    """Cornish and Fisher's expansion around the normal quantile (Abramowitz and Stegun 26.7.5)."""
    if n in _STUDENT:
        return _STUDENT[n]
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / n**power for power, term in enumerate(terms, start=1))


def lost_likeness(one: Metrics, two: Metrics) -> float:
    """What the Bhattacharyya coefficient of errors of one distribution lacks to 1.

    Each bin costs a little, on average a third of what is allowed (simulated with 64 to 10,000
    normal errors), and so do the widths, which differ by chance: 1 - 1/sqrt(cosh(ln ratio)).
    """
    bins = max(_bins(one), _bins(two))
    width = math.log(rms_ratio(min(one.compared, two.compared)))
    return bins * (1 / one.compared + 1 / two.compared) / 2 + 1 - 1 / math.sqrt(math.cosh(width))


def larger(one: Metrics, two: Metrics) -> int:
    """How many errors of `one` are larger than all of `two`, by their powers of two."""
    top = max(_sizes(two), default=-math.inf)
    return sum(count for size, count in _sizes(one).items() if size > top)


def larger_by_chance(one: Metrics, two: Metrics) -> float:
    """So many of `one` are larger than all of `two` once in 1000, if both are of one distribution.

    Whatever that is: of equally many errors each order is equally likely, so the k largest are all
    of `one` once in 2^k.
    """
    if not one.compared or not two.compared:
        return math.inf
    return math.log(1000) / math.log1p(two.compared / one.compared)


def _sizes(metrics: Metrics) -> Counter[int]:
    found = metrics.error_histogram.absolute
    return Counter(found.negative) + Counter(found.positive)


def _bins(metrics: Metrics) -> int:
    found = metrics.error_histogram.absolute
    return len(found.negative) + len(found.positive) + bool(found.zero)
