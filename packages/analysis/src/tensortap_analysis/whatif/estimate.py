"""What a format would do to a tensor of which only statistics with exponents were captured.

The histogram says how many values have each exponent, not where they lie between two powers of
two: a smooth curve through the known counts says that (see `spread`). For a format with one scale
that is all it takes. A format with blocks also depends on which values share a block; they
are taken as drawn independently of each other, so that the largest of B values is below x with
probability F(x)**B. Real tensors differ from that: where large values keep to a few channels or
tokens, more blocks hold none of them and the format does better than estimated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tensortap.formats import Codec
from tensortap.records import Statistics
from tensortap_analysis.whatif.rounding import Tally, Values, scaled_as_a_whole, tally
from tensortap_analysis.whatif.spread import spread

_POINTS = 64
"""Points in an octave for formats with one scale."""
_FINE, _COARSE = 32, 6
"""Points in an octave for formats with blocks, whose cost is their square: fine where many values
are or the largest ones, coarse in the long tail of small ones."""


def estimate(codec: Codec, stats: Statistics, dtype: torch.dtype) -> Tally:
    """Expected counts and sums; `stats` must have exponents. Signal and nonzero are exact."""
    assert stats.exponents is not None
    if stats.nan + stats.posinf + stats.neginf and scaled_as_a_whole(codec):
        return Tally(lost=stats.finite)
    if not stats.exponents or not stats.absmax:
        return Tally()
    if codec.block is None:
        found = _by_itself(codec, stats.exponents, stats.absmax, dtype)
    else:
        found = _by_blocks(codec, stats.exponents, stats.absmax, stats.zero, dtype)
    return replace(found, signal=(stats.l2 or 0.0) ** 2, nonzero=sum(stats.exponents.values()))


def _by_itself(
    codec: Codec, exponents: Mapping[int, int], absmax: float, dtype: torch.dtype
) -> Tally:
    points, weights = spread(exponents, absmax, _POINTS, dtype)
    largest = torch.tensor(absmax, dtype=points.dtype)
    return tally(codec, Values(points.reshape(1, -1), largest, weights.reshape(1, -1)))


def _by_blocks(
    codec: Codec, exponents: Mapping[int, int], absmax: float, zeros: int, dtype: torch.dtype
) -> Tally:
    """Every value beside every possible largest value of its block, by their joint probability."""
    assert codec.block is not None
    points, weights = _where_it_matters(exponents, absmax, dtype)
    count = float(weights.sum()) + zeros
    below = (torch.cumsum(weights, 0) + zeros) / count
    before = torch.cat([torch.tensor([zeros / count], dtype=torch.float64), below[:-1]])
    others = codec.block - 1
    found = Tally()
    for rows in torch.split(torch.arange(len(points)), 64):
        # [largest of the block, value]: the value is the largest one itself on the diagonal.
        joint = weights * (below[rows] ** others - before[rows] ** others)[:, None]
        joint = joint.tril(diagonal=int(rows[0]) - 1)
        joint[torch.arange(len(rows)), rows] = weights[rows] * below[rows] ** others
        found.add(_in_blocks(codec, points, points[rows], joint, absmax))
    return found


def _where_it_matters(
    exponents: Mapping[int, int], absmax: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of all octaves and their weights, finer in those that decide the result."""
    total, top = sum(exponents.values()), max(exponents)
    fine = spread(exponents, absmax, _FINE, dtype)
    coarse = spread(exponents, absmax, _COARSE, dtype)
    chosen = [
        fine if exponents[exponent] > total / 50 or exponent > top - 3 else coarse
        for exponent in sorted(exponents)
    ]
    points = torch.cat([octaves[0][row] for row, octaves in enumerate(chosen)])
    return points, torch.cat([octaves[1][row] for row, octaves in enumerate(chosen)])


def _in_blocks(
    codec: Codec, points: torch.Tensor, tops: torch.Tensor, joint: torch.Tensor, absmax: float
) -> Tally:
    """Round each point in a block whose largest value is `tops`; a block's first value is that."""
    assert codec.block is not None
    places = codec.block - 1
    missing = -len(points) % places
    values = torch.minimum(points.expand(len(tops), -1), tops[:, None])
    values = torch.nn.functional.pad(values, (0, missing)).view(-1, places)
    weights = torch.nn.functional.pad(joint, (0, missing)).view(-1, places)
    first = tops.repeat_interleave(values.shape[0] // len(tops))[:, None]
    both = Values(
        torch.cat([first, values], dim=1),
        torch.tensor(absmax, dtype=points.dtype),
        torch.cat([torch.zeros_like(weights[:, :1]), weights], dim=1),
    )
    return tally(codec, both)
