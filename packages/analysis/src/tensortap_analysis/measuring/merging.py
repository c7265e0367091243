"""The statistics of a logical tensor, from those of its pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensortap.records import Placement, Segment, Statistics, TensorRecord
from tensortap.store.lookup import without_replicas
from tensortap_analysis.captured.moments import Captured
from tensortap_analysis.pairs.reasons import NotComparable

Held = tuple[tuple[int, tuple[Segment, ...]], ...]
"""Which stretches of which axes; nothing for axes that are held whole."""


@dataclass(frozen=True, slots=True)
class Merged:
    """Statistics, of all elements, or of those that a lone piece holds."""

    statistics: Statistics
    held: Held = ()


def merged(found: Captured, records: Sequence[TensorRecord]) -> Merged:
    """The statistics of a tensor from the records of its pieces.

    Raises `NotComparable` where those do not tell them. Copies of a piece count once, and must
    say the same. The leading values are kept where one piece is the whole.
    """
    for record in records:
        _require_countable(record, found)
    distinct: dict[Held, list[TensorRecord]] = {}
    for record in records:
        distinct.setdefault(held(record), []).append(record)
    for copies in distinct.values():
        _require_agreement(copies)
    pieces = {place: _stats(copies[0]) for place, copies in distinct.items()}
    if len(pieces) == 1:
        [(place, statistics)] = pieces.items()
        return Merged(statistics, place)
    if sum(piece.count for piece in pieces.values()) != _values(records[0]):
        raise NotComparable("statistics of pieces that overlap, or are not all there, do not merge")
    return Merged(together(list(pieces.values())))


def together(pieces: Sequence[Statistics]) -> Statistics:
    """Population statistics of disjoint pieces together (Chan, Golub and LeVeque, 1979)."""
    some = [piece for piece in pieces if piece.finite]
    counts = _counts(pieces)
    if not some:
        return replace(pieces[0], **counts, first=(), exponents=None)
    n = sum(piece.finite for piece in some)
    mean = math.fsum(_of(piece.mean) * (piece.finite / n) for piece in some)
    spread = math.fsum(
        (piece.finite / n) * (_of(piece.std) ** 2 + (_of(piece.mean) - mean) ** 2) for piece in some
    )
    return Statistics(
        **counts,
        min=min(_of(piece.min) for piece in some),
        max=max(_of(piece.max) for piece in some),
        absmax=max(_of(piece.absmax) for piece in some),
        mean=mean,
        std=math.sqrt(spread),
        rms=math.hypot(*(_of(piece.rms) * math.sqrt(piece.finite / n) for piece in some)),
        l1=math.fsum(_of(piece.l1) for piece in some),
        l2=math.hypot(*(_of(piece.l2) for piece in some)),
    )


def held(record: TensorRecord) -> Held:
    """Which elements of the logical tensor a piece holds."""
    place = record.placement
    if place is None:
        return ()
    shape = place.logical_shape or record.shape
    some = ((axis % max(len(shape), 1), tuple(runs)) for axis, runs in place.segments.items())
    return tuple(sorted((axis, runs) for axis, runs in some if runs != ((0, shape[axis]),)))


def _stats(record: TensorRecord) -> Statistics:
    if record.stats is None:
        raise NotComparable("it has neither values nor statistics")
    return record.stats


def _require_countable(record: TensorRecord, found: Captured) -> None:
    """Statistics of summands, of what has no place, or of padding are not those of the tensor."""
    place, rank = record.placement, record.at.rank
    if place is None:
        return
    if place.unknown:
        raise NotComparable("statistics of pieces that have no place do not compare")
    parallel = found.run.info_of(rank).parallel
    if any(parallel.get(group) != 1 for group in groups_to_sum(place, found)):
        raise NotComparable("statistics of summands do not tell those of the sum")
    if is_padded(place, record.shape):
        raise NotComparable("statistics include the padding, which is not compared")


def groups_to_sum(place: Placement, found: Captured) -> tuple[str, ...]:
    """The groups that pieces are summed over, where this one data-parallel rank is compared."""
    return place.partial if found.moment.dp_rank is None else without_replicas(place.partial)


def is_padded(place: Placement, shape: Sequence[int]) -> bool:
    """Is a part of the tensor padding?"""
    logical = place.logical_shape or shape
    return any(length < logical[axis] for axis, length in place.valid.items())


def _require_agreement(copies: Sequence[TensorRecord]) -> None:
    first = copies[0]
    for other in copies[1:]:
        if _stats(other) != _stats(first):
            raise NotComparable(
                f"ranks {first.at.rank} and {other.at.rank} hold the same piece and disagree, by "
                "their statistics",
                "conflict",
            )


def _values(record: TensorRecord) -> int:
    """How many values the logical tensor has; a complex element counts for two."""
    shape = record.placement.logical_shape if record.placement is not None else record.shape
    return math.prod(shape) * (2 if record.dtype.startswith("complex") else 1)


def _counts(pieces: Sequence[Statistics]) -> dict[str, Any]:
    keys = ("count", "nan", "posinf", "neginf", "zero")
    return {key: sum(getattr(piece, key) for piece in pieces) for key in keys}


def _of(value: float | None) -> float:
    assert value is not None
    return value
