"""Norms that grew or vanished, and weights that begin at nothing, of which growth says little.

Biases, the second factor of a LoRA and new heads are zeros at first: their first step multiplies
their norm by any number. Of those, the size that they reach is judged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tensortap_analysis.weights.health import Issue, Severity
from tensortap_analysis.weights.health.issue import Limits
from tensortap_analysis.weights.roles import role_of

Row = Mapping[str, Any]

STOP = "Stop, go back to the checkpoint before, lower the learning rate tenfold, clip gradients."
WATCH = "Watch the learning rate and the gradient norm of these steps."
_BEGAN = "Biases, the second factor of a LoRA and new heads do so in their first steps."
_GONE = "Was it reset, or are the checkpoints in another order? Else go back to the one before."
_RECOVERED = "Was the checkpoint before sick? Then this is its recovery; else watch this step."
_VECTORS = ("vector", "table")
_OF_A_VECTOR, _OF_A_MATRIX = 0.1, 0.01
"""Sizes below which a weight has hardly begun: a bias beside activations of 1, and a matrix whose
outputs are a hundredth of its inputs; usual initialisations are from 0.04 on.
"""
_FEWEST = 3
"""Peers, below which there is no saying what is usual."""


def beginning(row: Row) -> bool:
    """Was it nothing, or nearly so?"""
    before = row["size_before"]
    return before is not None and before < _nothing(row)


def is_matrix(row: Row) -> bool:
    """Is it a factor of a product, or several?"""
    return row["kind"] not in _VECTORS


def _nothing(row: Row) -> float:
    return _OF_A_MATRIX if is_matrix(row) else _OF_A_VECTOR


def norm_issues(layer: str, row: Row, limits: Limits, *, classic: bool = False) -> Iterator[Issue]:
    """A norm that is many times what it was, or few.

    Weights grow in training: up to `explosion` times is told where it makes them large, or, in the
    `classic` way, always. That a norm vanished is a warning there, and critical here.
    """
    ratio = row["l2_norm_ratio"]
    if ratio is None:
        return
    if not beginning(row):
        yield from _changed(layer, row, ratio, limits, classic)
    elif ratio > 1:
        yield from _begun(layer, row, ratio, limits)
    elif ratio == 0:
        yield _gone(layer, row, "warning")


def _changed(layer: str, row: Row, ratio: float, limits: Limits, classic: bool) -> Iterator[Issue]:
    vanishing: Severity = "warning" if classic else "critical"
    if ratio == 0:
        yield _gone(layer, row, vanishing)
        return
    grew = ratio > 1
    far = ratio if grew else 1 / ratio
    severe = far > limits["explosion"]
    limit = limits["explosion" if severe else "ratio"]
    if severe and not grew and not classic and _from_large(row, limits["large"]):
        yield _shrunk(layer, row, ratio)
        return
    ordinary = grew and not severe and not classic and row["size_after"] <= limits["large"]
    if far > limit and not ordinary:
        severity: Severity = "warning" if not severe else "critical" if grew else vanishing
        cause = f"{_whose(row)} is {ratio:.3g} times what it was"
        word, remedy = "explosion" if grew else "vanishing", STOP if severe else WATCH
        yield Issue(layer, word, severity, f"{cause}{_norms(row)}.", remedy, ratio, limit,
                    far / limit)  # fmt: skip


def _from_large(row: Row, large: float) -> bool:
    """Was it larger than layers are, and is it of a usual size now?"""
    before, after = row["size_before"], row["size_after"]
    return bool(before and after and before > large and after >= _nothing(row))


def _shrunk(layer: str, row: Row, ratio: float) -> Issue:
    cause = (
        f"{_whose(row)} is {ratio:.3g} times what it was{_norms(row)}: it was large, and is of a "
        "usual size now."
    )
    return Issue(layer, "vanishing", "warning", cause, _RECOVERED, ratio, None, 1 / ratio)


def _gone(layer: str, row: Row, severity: Severity) -> Issue:
    what = f"values of expert {row['norm_expert']}" if "norm_expert" in row else "its values"
    cause = f"All {what} are 0, and were not."
    return Issue(layer, "vanishing", severity, cause, _GONE, 0.0, 0.0, math.inf)


def _whose(row: Row) -> str:
    return f"The norm of expert {row['norm_expert']}" if "norm_expert" in row else "Its norm"


def _norms(row: Row) -> str:
    """Both; those of a stack are not those of the expert that is meant."""
    before, after = row["l2_before"], row["l2_after"]
    return "" if "norm_expert" in row else f": {before:.3g}, now {after:.3g}"


def _begun(layer: str, row: Row, ratio: float, limits: Limits) -> Iterator[Issue]:
    size, limit = row["size_after"], limits["large"]
    if size > limit:
        severe = size > limit * limits["explosion"]
        severity: Severity = "critical" if severe else "warning"
        cause = f"It was {_was(row)}, and now {_size(row)}."
        yield Issue(layer, "explosion", severity, cause, STOP if severe else WATCH, size, limit,
                    size / limit)  # fmt: skip
    elif ratio > limits["explosion"]:
        yield Issue(layer, "began", "info", f"It was {_was(row)} and began to learn.", _BEGAN)


def _was(row: Row) -> str:
    return "nearly nothing" if row["size_before"] else "all zeros"


def _size(row: Row) -> str:
    """`size_after` in words."""
    size = row["size_after"]
    if not is_matrix(row):
        return f"its root mean square is {size:.3g}"
    return f"its outputs are {size:.3g} times independent inputs"


def begun_apart(layers: Mapping[str, Row], limits: Limits) -> Iterator[Issue]:
    """Weights that began at nothing and are many times as large as others that did so.

    Those of the same role in other depths, where there are enough; else of all of the same kind,
    and `explosion` times as many, for roles differ.
    """
    begun = {
        layer: row for layer, row in layers.items()
        if beginning(row) and row["size_after"] and row["size_after"] > row["size_before"]
    }  # fmt: skip
    for layer, row in begun.items():
        usual, limit = _usual(layer, row, begun, limits)
        ratio = row["size_after"] / usual
        if ratio > limit and row["size_after"] > _nothing(row):
            severe = ratio > limits["peers"] * limits["explosion"]
            cause = (
                f"It was {_was(row)}, and now {_size(row)}: {ratio:.3g} times the median of those "
                "that began with it."
            )
            yield Issue(layer, "explosion", "critical" if severe else "warning", cause,
                        STOP if severe else WATCH, ratio, limit, ratio / limit)  # fmt: skip


def _usual(layer: str, row: Row, begun: Mapping[str, Row], limits: Limits) -> tuple[float, float]:
    """The usual size, and how many times as much is too much; infinite where nothing is usual."""
    alike = {name: one for name, one in begun.items() if one["kind"] == row["kind"]}
    same = [one["size_after"] for name, one in alike.items() if role_of(name) == role_of(layer)]
    if len(same) >= _FEWEST:
        return statistics.median(same), limits["peers"]
    sizes = [one["size_after"] for one in alike.values()]
    usual = statistics.median(sizes) if len(sizes) >= _FEWEST else math.inf
    return usual, limits["peers"] * limits["explosion"]


def whole_way(rows: Sequence[Row]) -> Row | None:
    """First to last of several steps, as a row of one step; `None` where a norm is not known."""
    first, last = rows[0], rows[-1]
    before, after = first["l2_before"], last["l2_after"]
    if len(rows) < 2 or not before or after is None:
        return None
    return {
        "kind": last["kind"], "l2_before": before, "l2_after": after,
        "l2_norm_ratio": after / before,
        "size_before": first["size_before"], "size_after": last["size_after"],
    }  # fmt: skip
