"""How far the rounding of the stored dtype alone moves singular values.

A value stored with a spacing of `ulp` around it carries a rounding error of standard deviation
ulp / sqrt(12). No singular value moves by more than the spectral norm of the errors (Weyl), and for
independent errors that norm is about the largest norm of their rows plus that of their columns
(Bandeira and van Handel, Ann. Probab. 44, 2016): of a matrix of equally large values
ulp / sqrt(12) * (sqrt(rows) + sqrt(columns)). For bfloat16 that is 1.6e-3 of the largest singular
value of a random matrix of any shape, so condition numbers above about 600 are not known.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from tensortap_analysis.weights.measures.facts import Facts
from tensortap_analysis.weights.measures.gram import Spectrum
from tensortap_analysis.weights.measures.steps import of_steps


def resolution(facts: Facts, found: Spectrum) -> float:
    """The distance by which singular values are uncertain, in units of `facts.unit`.

    At least that of a decomposition in float64: max(rows, columns) * 2.2e-16 of the largest.
    """
    computed = max(facts.matrix.shape) * float(np.finfo(np.float64).eps) * float(found.values[0])
    return max(computed, _of_rounding(facts, found))


def _of_rounding(facts: Facts, found: Spectrum) -> float:
    if not facts.dtype.is_floating_point:
        return of_steps(facts)
    return _relative(facts) * (math.sqrt(found.short) + math.sqrt(found.long))


def _relative(facts: Facts) -> float:
    """The root mean square of the rounding errors over that of the values.

    An ulp is eps times the power of two of a value; subnormal values share that of the smallest
    normal one. Values that were codes times a scale are taken to reach the dtype's largest one.
    """
    info = torch.finfo(facts.dtype)
    scale = 1.0 if facts.matrix.dtype is facts.dtype else (facts.statistics.absmax or 0) / info.max
    least = max(info.smallest_normal * scale * facts.unit, 1e-300)
    spacing = 0.0
    for exponent, count in facts.exponents.items():
        power = math.ldexp(facts.unit, exponent)
        spacing += count * max(power, least) ** 2
    signal = float(facts.rows.rows["squares"].sum())
    return info.eps * math.sqrt(spacing / signal / 12)
