"""What is added up of pairs, as the kernel lays it out; the other side of `totals.h`."""

from __future__ import annotations

import ctypes

import numpy as np


class Moments(ctypes.Structure):
    """Smallest and largest value, mean as seen from an origin, sum of squared deviations."""

    lo: float
    hi: float
    mean: float
    m2: float
    _fields_ = tuple((name, ctypes.c_double) for name in ("lo", "hi", "mean", "m2"))


class Totals(ctypes.Structure):
    """What is known of the pairs so far; counters first. `totals` in totals.h.

    `largest` is the largest difference in units of `Frame.half` (-1: none yet), `at` the place
    of its first occurrence.
    """

    count: int
    compared: int
    nan_ref: int
    nan_other: int
    inf_ref: int
    inf_other: int
    mismatches: int
    unequal: int
    zero: int
    at: int
    ulp_max: int
    ref: Moments
    other: Moments
    difference: Moments
    abs_ref: float
    abs_difference: float
    comoment: float
    largest: float
    relative_max: float
    relative_sum: float
    ulp_sum: float
    COUNTERS = (
        "count", "compared", "nan_ref", "nan_other", "inf_ref", "inf_other", "mismatches",
        "unequal", "zero",
    )  # fmt: skip
    SUMS = ("abs_ref", "abs_difference", "comoment", "relative_sum", "ulp_sum")
    _fields_ = (
        *((name, ctypes.c_int64) for name in (*COUNTERS, "at")),
        ("ulp_max", ctypes.c_uint64),
        *((name, Moments) for name in ("ref", "other", "difference")),
        *((name, ctypes.c_double) for name in ("abs_ref", "abs_difference", "comoment")),
        *((name, ctypes.c_double) for name in ("largest", "relative_max")),
        *((name, ctypes.c_double) for name in ("relative_sum", "ulp_sum")),
    )

    @classmethod
    def none(cls) -> Totals:
        """Of no pairs."""
        empty = [Moments(np.inf, -np.inf, 0.0, 0.0) for _ in range(3)]
        return cls(at=-1, largest=-1.0, ref=empty[0], other=empty[1], difference=empty[2])


class Frame(ctypes.Structure):
    """Units of the sums, powers of two, and origins of the means; `frame` in pairs.h.

    The difference is `(other * half - ref * half) * difference`: `half` is 1, or 0.5 where the
    plain difference would overflow.
    """

    ref: float
    other: float
    half: float
    difference: float
    ref_origin: float
    other_origin: float
    difference_origin: float
    _fields_ = tuple(
        (name, ctypes.c_double)
        for name in (
            "ref", "other", "half", "difference", "ref_origin", "other_origin",
            "difference_origin",
        )
    )  # fmt: skip
