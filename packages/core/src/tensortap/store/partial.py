"""Pieces that are summands: adding them up over the groups their placement names."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from tensortap.errors import RunError
from tensortap.store.pieces import Geometry, Piece, geometry


def sum_partial(pieces: Sequence[Piece]) -> list[Piece]:
    """`pieces` with every complete set of summands replaced by its sum.

    Summands belong together when the named groups connect their ranks. Those that
    lie at the same place are added; a piece counts as zero elsewhere (the gradient of a key head
    that only some tensor-parallel ranks share). The sum is taken in float64 (integers: int64),
    in the order of the group, and rounded once. Raises `RunError` naming the summands that are
    missing.
    """
    whole = [piece for piece in pieces if not _groups(piece)]
    summands = [piece for piece in pieces if _groups(piece)]
    return whole + [total for members in _sets(summands) for total in _sums(members)]


def _groups(piece: Piece) -> tuple[str, ...]:
    return piece.placement.partial if piece.placement is not None else ()


def _sets(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces whose ranks are connected through the groups they are to be summed over."""
    sets: list[tuple[set[Hashable], list[Piece]]] = []
    for piece in pieces:
        links, members = _links(piece), [piece]
        apart = []
        for other_links, others in sets:
            if links & other_links:
                links, members = links | other_links, others + members
            else:
                apart.append((other_links, others))
        sets = [*apart, (links, members)]
    return [members for _, members in sets]


def _links(piece: Piece) -> set[Hashable]:
    """What a piece shares with the others of its set, and with no piece of another one.

    A group's first rank, where `parallel` tells it; else its place in all the other groups.
    """
    groups = _groups(piece)
    firsts = {group: piece.parallel.get(f"{group}_first") for group in groups}
    if None not in firsts.values():
        return {(groups, group, first) for group, first in firsts.items()}
    summed = {f"{group}_rank" for group in groups}
    return {
        (
            groups,
            tuple(
                sorted(
                    (key, place)
                    for key, place in piece.parallel.items()
                    if key.endswith("_rank") and key not in summed
                )
            ),
        )
    }


def _sums(members: list[Piece]) -> list[Piece]:
    """One sum for each place that members of a set lie at."""
    groups = _groups(members[0])
    found = {_place(piece, groups): piece for piece in members}
    if len(found) < len(members):
        ranks = [piece.rank for piece in members]
        raise RunError(f"ranks {ranks} hold the same summand over {groups}; ask with rank=")
    expected = math.prod(members[0].parallel[group] for group in groups)
    if len(found) != expected:
        raise RunError(
            f"a sum over {', '.join(groups)} has {expected} summands, but only those of ranks "
            f"{sorted(piece.rank for piece in members)} were captured; ask for one with rank="
        )
    places: dict[Geometry, list[Piece]] = {}
    for place in sorted(found):
        places.setdefault(geometry(found[place]), []).append(found[place])
    return [
        replace(same[0], tensor=_add([piece.tensor for piece in same])) for same in places.values()
    ]


def _place(piece: Piece, groups: Sequence[str]) -> tuple[int, ...]:
    for group in groups:
        if group not in piece.parallel or f"{group}_rank" not in piece.parallel:
            raise RunError(
                f"rank {piece.rank} holds a summand over {group!r}, but its {group} and "
                f"{group}_rank are not in the run's `parallel`; ask for it with rank={piece.rank}"
            )
    return tuple(piece.parallel[f"{group}_rank"] for group in groups)


def _add(summands: list[torch.Tensor]) -> torch.Tensor:
    dtype = summands[0].dtype
    if any(part.dtype != dtype for part in summands):
        raise RunError(f"summands differ in dtype: {sorted({str(s.dtype) for s in summands})}")
    wide = _wide(dtype)
    total = summands[0].to(wide)
    for part in summands[1:]:
        total = total + part.to(wide)
    return total.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    if dtype.is_floating_point and dtype != getattr(torch, "float4_e2m1fn_x2", None):
        return torch.float64
    if dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        return torch.int64
    raise RunError(f"{dtype} cannot be summed; ask with rank=")
