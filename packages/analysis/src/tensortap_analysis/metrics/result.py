"""What two tensors differ by: frozen data that reads and writes itself as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensortap.records import decode_float, encode_float


@dataclass(frozen=True, slots=True)
class Side:
    """Statistics of the compared values of one side, or of the differences.

    `std` is the population standard deviation. All are `None` where nothing was compared.
    """

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    rms: float | None
    absmax: float | None


@dataclass(frozen=True, slots=True)
class Octaves:
    """How often differences have each size and sign.

    An exponent e counts those with 2**e <= |x| < 2**(e+1); -1023 all below 2**-1022 that are
    not counted in `zero`, 1024 those beyond float64.
    """

    negative: Mapping[int, int]
    zero: int
    positive: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class ErrorHistogram:
    """Signed differences, and the same over |ref| + 1e-8; the bins are the same for all pairs."""

    absolute: Octaves
    relative: Octaves


@dataclass(frozen=True, slots=True)
class Metrics:
    """How `other` differs from `ref`; d = other - ref in float64, where both are finite.

    `count` counts pairs of values (a complex element holds two), `compared` those that are finite
    on both sides, `nonfinite_mismatches` those where a NaN or infinity of one side is not the same
    on the other. All else is over the compared pairs, `ref` and `other` as well. A metric is
    `None` where it is undefined: everything where nothing was compared, `cosine` where a side is
    all zero, `correlation` where a side is constant, `relative_l2` where `ref` is all zero, ulp
    distances where the dtypes are not one float dtype. `sqnr_db` is infinite for d = 0 (even if
    `ref` is 0) and minus infinite for ref = 0. Other infinities are values beyond float64.

    `max_abs_at` is the index of the first |d| = `max_abs`. `relative_mse` is mse /
    (mean(ref**2) + 1e-8), `relative_mae` mae / (mean|ref| + 1e-8); `relative_max`, `_mean` and
    `_median` are of |d| / (|ref| + 1e-8) element by element. `percentiles` of |d| are exact, with
    linear interpolation as numpy's. Ulp distances count representable values, +0 and -0 as one.
    `bitwise_equal`: one dtype and the same bits everywhere, NaN included.
    """

    count: int
    compared: int
    nan_ref: int
    nan_other: int
    inf_ref: int
    inf_other: int
    nonfinite_mismatches: int
    ref: Side
    other: Side
    difference: Side
    mse: float | None
    rmse: float | None
    mae: float | None
    max_abs: float | None
    max_abs_at: tuple[int, ...] | None
    relative_mse: float | None
    relative_mae: float | None
    relative_max: float | None
    relative_mean: float | None
    relative_median: float | None
    relative_l2: float | None
    cosine: float | None
    correlation: float | None
    sqnr_db: float | None
    ulp_max: int | None
    ulp_mean: float | None
    percentiles: Mapping[int, float]
    bitwise_equal: bool
    error_histogram: ErrorHistogram

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, NaN and infinities as strings; names are those of the fields."""
        encoded: dict[str, Any] = _encode(dataclasses.asdict(self))
        return encoded

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Metrics:
        """Inverse of `to_json`; raises `KeyError` or `TypeError` for anything else."""
        fields = {field.name: document[field.name] for field in dataclasses.fields(cls)}
        for name in ("ref", "other", "difference"):
            fields[name] = Side(**{key: decode_float(v) for key, v in document[name].items()})
        at, histogram = document["max_abs_at"], document["error_histogram"]
        return cls(**{
            **{name: _decode(value) for name, value in fields.items()},
            "max_abs_at": None if at is None else tuple(at),
            "percentiles": {
                int(rank): decode_float(value) for rank, value in document["percentiles"].items()
            },
            "error_histogram": ErrorHistogram(
                **{name: _octaves(histogram[name]) for name in ("absolute", "relative")}
            ),
        })  # fmt: skip


def _encode(value: Any) -> Any:
    if isinstance(value, float):
        return encode_float(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(inner) for key, inner in value.items()}
    return value


def _decode(value: Any) -> Any:
    return decode_float(value) if isinstance(value, str) else value


def _octaves(document: Mapping[str, Any]) -> Octaves:
    sides = {
        sign: {int(exponent): count for exponent, count in document[sign].items()}
        for sign in ("negative", "positive")
    }
    return Octaves(zero=document["zero"], **sides)
