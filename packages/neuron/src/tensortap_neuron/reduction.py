"""The statistics of `tensortap.stats` in operations that XLA and Neuron devices have.

The definition is that of the core. Sums are of rows of some thousand values, in float64 where the
device has it and in float32 where it does not; the host merges the rows in float64. Exact in
either case: counts, min, max and the leading values, of everything but integers and float64
that the wider type cannot hold. In float32 mean, std, rms, l1 and l2 are right to about 1e-6 of
what float64 gives. Values that the device's arithmetic takes for zero (subnormal float32 on XLA's
CPU) count as zero.

A compiler sees all of this once for each tensor of a step. What takes it long is the number of
reductions, so there are few of them, over features side by side: two in float64, three in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tensortap import stats
from tensortap.errors import NotSupported
from tensortap.native.binding import EXPONENT_MIN, EXPONENTS, LEADING
from tensortap.records import Statistics

_ROW_LENGTH = {torch.float32: 1 << 13, torch.float64: 1 << 16}
"""Values summed on the device; short enough for float32 sums and counts."""
_NUMBERS = 11
"""Of a row: nan, posinf, neginf, zero, l1, drift, squares, max, -min, origin, unit.

`l1` and the three that follow from it on are of values divided by `unit`; `drift` is the sum of
deviations from `origin`, `squares` that of their squares.
"""
_UNIT = {torch.float32: (2.0**55, 2.0**80), torch.float64: (2.0**480, 2.0**600)}
"""Beyond the first, or below its inverse, values are divided by the second before squaring."""
_POWERS = {torch.float32: (-149, 277), torch.float64: (EXPONENT_MIN, EXPONENTS)}
"""The least exponent of the type, and how many it has."""
_HALF = 4096
"""Counts of exponents travel as two digits to this base: float32 is exact up to 2**24 only."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What is in a vector of `vector`: leading values, rows of numbers, counts of exponents."""

    count: int
    wide: torch.dtype
    exponents: bool

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(rows, values in a row): the whole rows, and the one that is left over."""
        length = _ROW_LENGTH[self.wide]
        rows, rest = divmod(self.count, length)
        return [block for block in ((rows, length), (1, rest)) if all(block)]


def layout(tensor: torch.Tensor, *, exponents: bool, wide: torch.dtype) -> Layout:
    """The layout of `vector` for the same arguments. Raises `NotSupported` for odd dtypes."""
    stats.check(tensor)
    if tensor.dtype.itemsize > 8 or tensor.dtype is getattr(torch, "float4_e2m1fn_x2", None):
        raise NotSupported(f"{tensor.dtype} on {tensor.device.type}: the device has no such type")
    return Layout(tensor.numel() * (1 + tensor.is_complex()), wide, exponents)


@torch.no_grad()
def vector(
    tensor: torch.Tensor, layout: Layout, powers: torch.Tensor | None = None
) -> torch.Tensor:
    """What `statistics` needs, as one vector of type `layout.wide` on the tensor's device.

    For exponents, `powers` is `powers_of_two(layout.wide, device)`.
    """
    values = _values(tensor.detach()).to(layout.wide)
    parts, start = [values[:LEADING]], 0
    large = layout.wide is torch.float32 or tensor.dtype is torch.float64
    for rows, length in layout.blocks:
        block = values[start : start + rows * length].reshape(rows, length)
        parts.append(_numbers(block, large=large).reshape(-1))
        start += rows * length
    if powers is not None:
        parts.append(_exponents(values, powers))
    return torch.cat(parts)


def powers_of_two(wide: torch.dtype, device: torch.device) -> torch.Tensor:
    """Every power of two from the least subnormal of `wide` on, and infinity."""
    least, count = _POWERS[wide]
    exact = [math.ldexp(1.0, least + at) for at in range(count)]
    return torch.tensor([*exact, math.inf], dtype=wide).to(device)


def statistics(numbers: Sequence[float], layout: Layout) -> Statistics:
    """Statistics from the values of a vector, once they are on the host."""
    leading = min(LEADING, layout.count)
    first, end = numbers[:leading], leading
    rows: list[list[float]] = []
    for many, length in layout.blocks:
        start, end = end, end + many * _NUMBERS
        rows += [_row(numbers[start + at : end : many], length) for at in range(many)]
    # Means are reported as distances from an origin: see `tensortap.stats`.
    origin = next((row[7] * row[10] for row in rows if row[0]), 0.0)
    for row in rows:
        row[7] -= origin / row[10]
    counts = list(_counts(numbers[end:], layout.wide)) if layout.exponents else []
    head = [float(layout.exponents), *counts, origin, float(leading)]
    body = [*first, *[0.0] * (LEADING - leading), *(number for row in rows for number in row)]
    return stats.finish(torch.tensor([*head, *body], dtype=torch.float64))


def _values(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().reshape(-1)


def _numbers(block: torch.Tensor, *, large: bool) -> torch.Tensor:
    """One column for each row of a block; `large`: its squares may leave the range of the type."""
    odd = ~torch.isfinite(block)
    ends = torch.stack([block, -block]).masked_fill(odd, -math.inf).amax(2)
    unit = _unit(ends.amax(0)) if large else torch.ones_like(ends[0])
    kept = block.masked_fill(odd, 0.0)
    scaled = kept / unit.unsqueeze(1) if large else kept
    origin = _origin(scaled, odd)
    deviation = (scaled - origin.unsqueeze(1)).masked_fill(odd, 0.0)
    kinds = (block.isnan(), block == math.inf, block == -math.inf, block == 0.0)
    counted = [kind.to(block.dtype) for kind in kinds]
    sums = torch.stack([*counted, scaled.abs(), deviation, deviation.square()]).sum(2)
    return torch.cat([sums, ends, torch.stack([origin, unit])])


def _origin(scaled: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """What deviations are measured from.

    In float32 their mean. In float64 any value of the row will do, however far off: its own
    deviation makes the variance so large that the digits lost do not count.
    """
    if scaled.dtype is torch.float64:
        return scaled[:, 0]
    sums = torch.stack([scaled, (~odd).to(scaled.dtype)]).sum(2)
    return sums[0] / sums[1].clamp(min=1.0)


def _unit(absmax: torch.Tensor) -> torch.Tensor:
    """A power of two; squares of values divided by it neither overflow nor vanish."""
    limit, unit = _UNIT[absmax.dtype]
    large = torch.where(absmax > limit, unit, torch.ones_like(absmax))
    return torch.where((absmax < 1 / limit) & (absmax > 0), 1 / unit, large)


def _row(column: Sequence[float], length: int) -> list[float]:
    """A column as `tensortap.stats.finish` reads it, with the mean itself for the distance."""
    nan, posinf, neginf, zero, l1, drift, squares, high, low, origin, unit = column
    finite = length - nan - posinf - neginf
    mean = drift / max(finite, 1.0)
    m2 = max(0.0, squares - drift * mean)
    return [finite, nan, posinf, neginf, zero, -low, high, origin + mean, m2, l1, unit]


def _exponents(values: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    """How many finite non-zero values lie between each power of two and the next, in digits.

    There is no `frexp` here: the logarithm is off by one at most, which the powers put right.
    """
    least, last = _POWERS[powers.dtype][0], powers.numel() - 2
    size = values.abs()
    counted = torch.isfinite(values) & (size != 0)
    guess = torch.floor(torch.log2(torch.where(counted, size, 1.0))).to(torch.int64) - least
    guess = guess.clamp(0, last)
    guess = torch.where(size < powers[guess], guess - 1, guess).clamp(0, last)
    guess = torch.where(size >= powers[guess + 1], guess + 1, guess).clamp(0, last)
    zeros = torch.zeros(last + 1, dtype=torch.int32, device=values.device)
    counts = zeros.scatter_add(0, guess, counted.to(torch.int32))
    low = counts % _HALF
    return torch.cat([(counts - low) // _HALF, low]).to(values.dtype)


def _counts(digits: Sequence[float], wide: torch.dtype) -> Iterator[float]:
    """Counts of all exponents of float64 from the digits of those of `wide`; none if empty."""
    least, many = _POWERS[wide]
    digits = digits or [0.0] * (2 * many)
    yield from [0.0] * (least - EXPONENT_MIN)
    for high, low in zip(digits[:many], digits[many:], strict=True):
        yield high * _HALF + low
    yield from [0.0] * (EXPONENTS - many - (least - EXPONENT_MIN))
