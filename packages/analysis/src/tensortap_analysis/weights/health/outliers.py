"""Which rows and columns stand out: what an issue about sizes names as its cause."""

from __future__ import annotations

import math
from typing import Any

from tensortap_analysis.weights.health.issue import Layer
from tensortap_analysis.weights.health.places import largest

_MOST = 0.5
"""The share of a matrix's energy from which those that stand out explain its size."""


def standing_out(layer: Layer) -> str:
    """`" Column 17 is 60 times the median column."`; empty where nothing stands out."""
    return "".join(f" {_said(layer, what)}" for what in ("column", "row") if _places(layer, what))


def explains(layer: Layer) -> bool:
    """Do a few rows or columns, or one value, hold most of the energy?"""
    if in_one_value(layer):
        return True
    sides = {"row": layer.outputs, "column": layer.inputs}
    return any(_share(_places(layer, what), side) > _MOST for what, side in sides.items())


def in_one_value(layer: Layer) -> bool:
    """Does one value hold most of the energy?"""
    top, l2 = largest(layer), layer.get("norms", "l2")
    return top is not None and (top.size / l2) ** 2 > _MOST


def _share(places: list[list[Any]], side: int) -> float:
    """The part of the energy that places hold, if all others are as long as the median one."""
    energy = math.fsum(place[-1] ** 2 for place in places)
    return energy / (energy + max(side - len(places), 1))


def _places(layer: Layer, what: str) -> list[list[Any]]:
    return layer.get("norms", f"outlier_{what}s_at") or []


def _said(layer: Layer, what: str) -> str:
    first, *_ = _places(layer, what)
    count = layer.get("norms", f"outlier_{what}s")
    of = f" of expert {first[0]:,}" if layer.facts.kind == "experts" else ""
    more = f"; {count - 1:,} more stand out" if count > 1 else ""
    return f"{what.title()} {first[-2]:,}{of} is {first[-1]:.3g} times the median {what}{more}."
