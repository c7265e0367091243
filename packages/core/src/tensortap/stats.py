"""The statistics, defined once, computed where the tensor lies.

CPU tensors are reduced by the compiled kernel (`tensortap.native`). `raw` is the same reduction
in torch operations: the reference, the fallback, and what runs on other devices, without a host
synchronisation there. Either way memory is read once or twice, in pieces, and never modified.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tensortap import native
from tensortap.errors import NotSupported
from tensortap.native.binding import EXPONENT_MIN, EXPONENTS, LEADING
from tensortap.records import Statistics

_PIECE = {"cpu": 1 << 16}
_DEVICE_PIECE = 1 << 22
"""Elements reduced at a time: what fits a core's cache, and elsewhere what keeps a device busy."""
_ROW = 11
"""Numbers per piece: finite, nan, posinf, neginf, zero, min, max, mean, M2, l1, unit.

`mean` is the distance from the origin: means near 1e9 rounded to float64 could not tell 1e-8
between two pieces.
"""
_BIG, _UNIT = 2.0**480, 2.0**600

_FLOAT32_HOLDS = frozenset({
    torch.float16, torch.bfloat16, torch.float32, torch.bool, torch.uint8, torch.int8,
    torch.uint16, torch.int16,
    *(getattr(torch, name) for name in (
        "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    ) if hasattr(torch, name)),
})  # fmt: skip
_FLOAT64_HOLDS = frozenset({
    torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64,
})  # fmt: skip
_FP4 = getattr(torch, "float4_e2m1fn_x2", None)


def statistics(tensor: torch.Tensor, *, exponents: bool = False) -> Statistics:
    """Statistics of any strided tensor; waits for its device. Raises `NotSupported`."""
    check(tensor)
    if tensor.device.type == "cpu":
        kernel = native.library()
        if kernel is not None:
            return kernel.statistics(tensor, exponents=exponents)
    return finish(raw(tensor, exponents=exponents))


def check(tensor: torch.Tensor) -> None:
    """Raise `NotSupported` for what holds no values, or none that can be read one by one."""
    if tensor.layout is not torch.strided:
        raise NotSupported(f"{tensor.layout} has no strides; record its values() instead.")
    if tensor.device.type == "meta":
        raise NotSupported("A meta tensor holds no data; tap the model after it has real weights.")
    dtype = tensor.dtype
    if not (
        dtype in _FLOAT32_HOLDS or dtype in _FLOAT64_HOLDS or dtype.is_complex or dtype is _FP4
    ):
        raise NotSupported(f"{dtype} cannot be read as numbers; record dequantize() instead.")


@torch.no_grad()
def raw(tensor: torch.Tensor, *, exponents: bool = False) -> torch.Tensor:
    """What `finish` needs, as one float64 vector on the tensor's device; never waits for it.

    A flag for exponents, their histogram, the origin of means, how many leading values there
    are, those padded to `LEADING`, and one row of `_ROW` numbers for each piece of the tensor.
    """
    check(tensor)
    tensor = tensor.detach()
    stored, repeat = _without_repeats(tensor)
    limit = _PIECE.get(tensor.device.type, _DEVICE_PIECE)
    first = _first(tensor)
    origin = _origin(first)
    rows, powers = [], []
    for piece in _pieces(stored, limit):
        values = _values(piece)
        rows.append(_row(values, origin))
        if exponents:
            powers.append(_powers(piece, values))
    found = _fill(tensor, 0.0, 0, _ROW) if not rows else torch.stack(rows)
    if repeat != 1:
        found.narrow(1, 0, 5).mul_(repeat)
        found.narrow(1, 8, 2).mul_(repeat)
    histogram = [sum(powers, _fill(tensor, 0, EXPONENTS)) * repeat] if exponents else []
    flag, leading = _fill(tensor, exponents, 1), _fill(tensor, first.numel(), 1)
    padding = _fill(tensor, 0.0, LEADING - first.numel())
    return torch.cat([flag, *histogram, origin.view(1), leading, first, padding, found.reshape(-1)])


def finish(raw: torch.Tensor) -> Statistics:
    """Statistics from the vector `raw` returned, once it is on the host."""
    numbers: list[float] = raw.tolist()
    start = 1 + (EXPONENTS if numbers[0] else 0)
    powers = _histogram(numbers[1:start]) if numbers[0] else None
    origin, leading, *body = numbers[start:]
    rows = [body[at : at + _ROW] for at in range(LEADING, len(body), _ROW)]
    return _report(rows, origin, tuple(body[: int(leading)]), powers)


def _fill(tensor: torch.Tensor, value: float, *shape: int) -> torch.Tensor:
    """A constant made on the device: to copy one there would wait for it."""
    return torch.full(shape, float(value), dtype=torch.float64, device=tensor.device)


def _without_repeats(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A view without expanded axes, and how often each of its elements occurs."""
    repeat = 1
    for axis in reversed(range(tensor.ndim)):
        size = tensor.shape[axis]
        if tensor.stride(axis) == 0 and size > 1 and tensor.numel():
            tensor, repeat = tensor.select(axis, 0), repeat * size
    return tensor, repeat


def _pieces(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """1-d pieces of at most `limit` elements, in storage order; views where that is possible."""
    if tensor.numel() == 0:
        return
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    tensor = tensor.permute(order)
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), limit)
    elif tensor.numel() <= limit:
        yield tensor.reshape(-1)
    else:
        rows = max(1, limit * tensor.shape[0] // tensor.numel())
        for block in torch.split(tensor, rows):
            yield from _pieces(block.select(0, 0) if rows == 1 else block, limit)


def _first(tensor: torch.Tensor) -> torch.Tensor:
    values = _values(_leading(tensor, LEADING)).to(torch.float64)
    return values.narrow(0, 0, min(LEADING, values.numel()))


def _leading(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` elements, or a few more, in logical order, without a copy of the rest."""
    while tensor.ndim > 1 and tensor.numel():
        inner = math.prod(tensor.shape[1:])
        if inner < count:
            return tensor.narrow(0, 0, min(tensor.shape[0], -(-count // inner))).reshape(-1)
        tensor = tensor.select(0, 0)
    return tensor.reshape(-1).narrow(0, 0, min(count, tensor.numel()))


def _origin(first: torch.Tensor) -> torch.Tensor:
    """A value of the tensor itself: never farther from the mean than the farthest of them."""
    if first.numel() == 0:
        return _fill(first, 0.0)
    return torch.nan_to_num(first.select(0, 0), nan=0.0, posinf=0.0, neginf=0.0)


def _values(piece: torch.Tensor) -> torch.Tensor:
    """The piece as float32, or as float64 where float32 cannot hold its values."""
    if piece.dtype is _FP4:
        return _fp4_values(piece.view(torch.uint8))
    if piece.is_complex():
        piece = torch.view_as_real(piece.resolve_conj().resolve_neg()).reshape(-1)
    piece = piece.resolve_neg()
    return piece.to(torch.float32 if piece.dtype in _FLOAT32_HOLDS else torch.float64)


def _fp4_values(packed: torch.Tensor) -> torch.Tensor:
    """E2M1, two values a byte, the low bits first: sign, two bits of exponent, one of mantissa."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(-1)
    exponent, mantissa = codes >> 1 & 3, (codes & 1) * 0.5
    normal = torch.ldexp(1.0 + mantissa, exponent.to(torch.int32) - 1)
    size = torch.where(exponent == 0, mantissa, normal)
    return torch.where(codes > 7, -size, size)


def _row(values: torch.Tensor, origin: torch.Tensor) -> torch.Tensor:
    finite = None if _plain(values) else torch.isfinite(values)
    kept = _masked(values, finite)
    if finite is None:
        zero = _fill(values, 0)
        counts = [_fill(values, values.numel()), zero, zero, zero]
        lo, hi = torch.aminmax(values)
    else:
        counts = [_count(finite), _count(values.isnan()), _count(values.isposinf())]
        counts.append(_count(values.isneginf()))
        lo = torch.where(finite, values, math.inf).amin()
        hi = torch.where(finite, values, -math.inf).amax()
    ends = [values.numel() - _count(values), lo.to(torch.float64), hi.to(torch.float64)]
    unit = _unit(torch.maximum(torch.maximum(-lo, hi), origin.abs().to(lo.dtype)))
    return torch.stack([*counts, *ends, *_moments(kept, finite, counts[0], origin, unit), unit])


def _plain(values: torch.Tensor) -> bool:
    """Whether all values are known to be finite. Only the CPU can be asked without waiting."""
    return values.device.type == "cpu" and math.isfinite(values.sum(dtype=torch.float64))


def _count(values: torch.Tensor) -> torch.Tensor:
    """How many are true, or not zero."""
    return torch.count_nonzero(values).to(torch.float64)


def _unit(absmax: torch.Tensor) -> torch.Tensor:
    """A power of two to divide by before squaring; only float64 leaves its own range."""
    unit = torch.ones_like(absmax, dtype=torch.float64)
    if absmax.dtype is torch.float64:
        unit = torch.where(absmax > _BIG, _UNIT, unit)
        unit = torch.where((absmax < 1 / _BIG) & (absmax > 0), 1 / _UNIT, unit)
    return unit


def _moments(
    kept: torch.Tensor,
    finite: torch.Tensor | None,
    count: torch.Tensor,
    origin: torch.Tensor,
    unit: torch.Tensor,
) -> list[torch.Tensor]:
    """Mean, M2 and l1 in units of `unit`, the mean as seen from `origin`."""
    wide = kept / unit if kept.dtype is torch.float64 else kept.to(torch.float64)
    deviation = _masked(wide - origin / unit, finite)
    mean = deviation.sum() / count.clamp(min=1)
    m2 = _masked(deviation - mean, finite).square_().sum()
    return [mean, m2, wide.abs().sum()]


def _masked(values: torch.Tensor, finite: torch.Tensor | None) -> torch.Tensor:
    return values if finite is None else torch.where(finite, values, 0)


def _powers(piece: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """How many finite non-zero values have each exponent, from `EXPONENT_MIN` on."""
    exponent = _integer_exponents(piece) if piece.dtype in _WIDE else torch.frexp(values)[1] - 1
    counted = torch.isfinite(values) & (values != 0)
    place = torch.where(counted, exponent - EXPONENT_MIN, EXPONENTS)
    counts = _fill(values, 0, EXPONENTS + 1)
    return counts.index_add_(0, place, counted.to(torch.float64)).narrow(0, 0, EXPONENTS)


_WIDE = (torch.int64, torch.uint64)


def _integer_exponents(piece: torch.Tensor) -> torch.Tensor:
    """Of 64-bit integers; as float64, 2**62 - 1 would round up into the next power of two."""
    signed = piece.view(torch.int64)
    size = signed if piece.dtype is torch.uint64 else signed.abs()
    size = torch.where(size >= 1 << 53, size & ~0x7FF, size)
    # Negative now: 2**63 and above, without a sign or as the one integer whose abs is negative.
    exponent = torch.frexp(size.to(torch.float64))[1] - 1
    return torch.where(size < 0, 63, exponent)


def _histogram(counts: Sequence[float]) -> dict[int, int]:
    return {at + EXPONENT_MIN: int(count) for at, count in enumerate(counts) if count}


@dataclass(slots=True)
class _Moments:
    """Moments of values divided by a common unit."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    l1: float = 0.0

    def add(self, count: float, mean: float, m2: float, l1: float) -> None:
        """Merge the moments of more values (Chan, Golub and LeVeque, 1979)."""
        both = self.count + count
        gap, share = mean - self.mean, count / both
        self.m2 += m2 + gap * gap * (self.count * share)
        self.mean += gap * share
        self.count, self.l1 = both, self.l1 + l1


def _report(
    rows: Sequence[Sequence[float]],
    origin: float,
    first: tuple[float, ...],
    exponents: dict[int, int] | None,
) -> Statistics:
    finite, nan, posinf, neginf, zero = (int(sum(row[at] for row in rows)) for at in range(5))
    count = finite + nan + posinf + neginf
    rows = [row for row in rows if row[0]]
    if not rows:
        return Statistics(count, nan, posinf, neginf, zero, *(None,) * 8, first, exponents)
    unit = max(row[10] for row in rows)
    total = _Moments()
    for row in rows:
        scale = row[10] / unit
        total.add(row[0], row[7] * scale, row[8] * scale * scale, row[9] * scale)
    lo, hi = min(row[5] for row in rows) + 0.0, max(row[6] for row in rows) + 0.0
    mean = origin / unit + total.mean
    squares = total.m2 + mean * mean * finite
    return Statistics(
        count, nan, posinf, neginf, zero, lo, hi, max(abs(lo), abs(hi)), mean * unit,
        math.sqrt(total.m2 / finite) * unit, math.sqrt(squares / finite) * unit,
        total.l1 * unit, math.sqrt(squares) * unit, first, exponents,
    )  # fmt: skip
