"""How a matrix will quantise: outliers, range, and the SQNR of int8 and of every number format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensortap import formats
from tensortap_analysis.weights.measures.facts import Facts, nothing, ratio
from tensortap_analysis.weights.measures.noise import noises, sqnr_db
from tensortap_analysis.weights.options import Options

_SPREAD = ("dynamic_range", "dynamic_range_rms", "kurtosis")
_METRICS = (
    "extreme_outlier_percentage", *_SPREAD, "sqnr_db", "sqnr_db_per_channel", "formats"
)  # fmt: skip


def quantization(facts: Facts, options: Options) -> dict[str, Any]:
    """Metrics of a matrix whose values are all finite; else they do not exist.

    `extreme_outlier_percentage`: of |w - mean| > 3 std. `dynamic_range`: max |w| / mean |w|;
    `dynamic_range_rms`: max |w| / rms. `kurtosis` is Pearson's: a normal distribution has 3.
    `sqnr_db`: of symmetric int8 with one scale, `sqnr_db_per_channel`: with one scale a row, and
    in `formats` of each format that is asked for, blocks lying along the rows. All but `formats`
    do not depend on the scale, and are computed of values near 1 where those are `extreme`.
    """
    if facts.unusable is not None:
        return nothing(_METRICS, facts.unusable)
    wanted = () if facts.extreme else options.formats
    near_1 = facts.scaled()
    found = _distribution(near_1) | _rounding(near_1, wanted)
    found["formats"] = dict.fromkeys(options.formats) | found["formats"]
    reasons = {"kurtosis": "all values are equal"}
    missing = [name for name in _METRICS if found[name] is None]
    reason = facts.all_zero
    unresolved = {name: reason or reasons[name] for name in missing}
    if (reason := reason or facts.extreme) is not None and options.formats:
        unresolved["formats"] = reason
    return found | {"unresolved": unresolved}


def _distribution(facts: Facts) -> dict[str, float | None]:
    found, elements = facts.statistics, facts.elements
    count = found.count
    assert found.absmax is not None
    assert found.l1 is not None
    assert found.rms is not None
    return {
        "extreme_outlier_percentage": 100 * elements.outliers / count,
        "dynamic_range": ratio(found.absmax, found.l1 / count),
        "dynamic_range_rms": ratio(found.absmax, found.rms),
        "kurtosis": elements.fourth / count if found.std else None,
    }


def _rounding(facts: Facts, wanted: Sequence[str]) -> dict[str, Any]:
    signal = float(facts.rows.rows["squares"].sum())
    codecs = {name: formats.get(name) for name in dict.fromkeys(("int8", *wanted))}
    noise = noises(facts, codecs)
    found = {name: sqnr_db(signal, noise[name]) for name in codecs}
    return {
        "sqnr_db": found["int8"],
        "sqnr_db_per_channel": sqnr_db(signal, float(facts.rows.rows["noise"].sum())),
        "formats": {name: found[name] for name in wanted},
    }
