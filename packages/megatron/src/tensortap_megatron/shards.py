"""Cuts: which stretches of a logical axis a rank holds, from the length of its piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensortap.records import Segment
from tensortap_megatron.parallel import Group

Cut = Callable[[int], tuple[int, tuple[Segment, ...]]]
"""Length of the piece -> length of the logical axis, and the stretches the piece holds."""


def whole(length: int) -> tuple[int, tuple[Segment, ...]]:
    """Every rank holds all of the axis."""
    return length, ((0, length),)


def split(group: Group) -> Cut:
    """One stretch a rank, in the order of ranks."""
    return lambda length: (length * group.size, ((group.rank * length, length),))


def unless_whole(cut: Cut, total: int | None) -> Cut:
    """`cut`, but for a piece that has been gathered to all `total` already."""
    return lambda length: whole(length) if length == total else cut(length)


def fused(group: Group, shares: Sequence[int]) -> Cut:
    """Several tensors one after the other, each split: a rank holds its piece of each.

    `shares` are the relative sizes of the tensors; the gate and up projection of a gated MLP
    are `fused(tp, (1, 1))`.
    """
    total = sum(shares)

    def cut(length: int) -> tuple[int, tuple[Segment, ...]]:
        segments, start = [], 0
        for share in shares:
            piece = length * share // total
            segments.append((start + group.rank * piece, piece))
            start += piece * group.size
        return start, tuple(segments)

    return cut


def shared(group: Group, pieces: int) -> Cut:
    """Fewer pieces than ranks: each piece is held by several ranks in a row (grouped queries)."""
    holder = group.rank * pieces // group.size
    return lambda length: (length * pieces, ((holder * length, length),))


def sequence(context: Group, tensor: Group) -> Cut:
    """The sequence axis: zigzag over context parallelism, then split over `tensor`.

    Of 2n chunks of the sequence, rank r of n has chunks r and 2n - 1 - r, so that causal
    attention is the same work everywhere (Megatron's `get_batch_on_this_cp_rank`). Sequence
    parallelism splits what a context-parallel rank holds.
    """

    def cut(length: int) -> tuple[int, tuple[Segment, ...]]:
        held = length * tensor.size
        logical = held * context.size
        if context.size == 1:
            return logical, ((tensor.rank * length, length),)
        chunk = held // 2
        chunks = [(context.rank, 0), (2 * context.size - 1 - context.rank, chunk)]
        begin, end = tensor.rank * length, (tensor.rank + 1) * length
        segments = []
        for number, at in chunks:
            first, last = max(begin, at), min(end, at + chunk)
            if first < last:
                segments.append((number * chunk + first - at, last - first))
        return logical, tuple(segments)

    return cut
