"""Powers of two that bring values to where their squares are numbers of float64."""

from __future__ import annotations

BIG = 2.0**480
"""Squares of values up to this, and down to one over it, stay inside the range of float64."""
_UNIT = 2.0**600


def unit_of(largest: float) -> float:
    """Values times this have squares inside the range of float64; 1 for most and for zeros."""
    if largest > BIG:
        return 1 / _UNIT
    return _UNIT if 0 < largest < 1 / BIG else 1.0
