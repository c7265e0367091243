"""What rounding a matrix to number formats costs: sums of squared errors, by their codecs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tensortap.formats import Codec, table
from tensortap_analysis.weights.measures.facts import Facts
from tensortap_analysis.weights.measures.pieces import witnessed
from tensortap_analysis.weights.measures.values import Values
from tensortap_analysis.whatif.rounding import scaled_as_a_whole


def noises(facts: Facts, codecs: Mapping[str, Codec]) -> dict[str, float]:
    """The squared error of each format over all values, in units of `facts.unit`.

    Blocks lie along a row, the contraction axis of a linear layer. All values must be finite. What
    a format cannot represent at all makes its error infinite.
    """
    total = dict.fromkeys(codecs, 0.0)
    distinct = facts.distinct
    by_place = dict(codecs)
    if distinct is not None:
        for name in [name for name, codec in codecs.items() if codec.block is None]:
            # The largest magnitude is among them: a scale of the whole tensor comes out right.
            total[name] = _noise(by_place.pop(name), distinct, distinct.x, facts.unit)
    if by_place:
        for piece, witness in witnessed(facts.matrix, facts.statistics.absmax or 0.0):
            values = Values(piece.reshape(-1))
            for name, codec in by_place.items():
                shaped = witness if scaled_as_a_whole(codec) else piece
                total[name] += _noise(codec, values, shaped, facts.unit)
    return total


def _noise(codec: Codec, values: Values, shaped: torch.Tensor, unit: float) -> float:
    """Of `values`, which are the leading ones of `shaped`."""
    rounded = codec.fake_quantize(shaped).reshape(-1)[: len(values.x)]
    noise = _squared_error(values, rounded, unit)
    if math.isfinite(noise):
        return noise
    # What overflows counts as the largest value there is.
    limit = next(row.max for row in table() if row.name == codec.name)
    noise = _squared_error(values, rounded.nan_to_num(math.nan, limit, -limit), unit)
    return noise if math.isfinite(noise) else math.inf


def _squared_error(values: Values, rounded: torch.Tensor, unit: float) -> float:
    error = (values.x - rounded).to(torch.float64)
    return values.squares(error if unit == 1.0 else error * unit)


def sqnr_db(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise): infinite where nothing changes, `None` where all values are 0."""
    if not signal:
        return None
    if noise and math.isfinite(noise):
        return 10 * (math.log10(signal) - math.log10(noise))
    return -math.inf if noise else math.inf
