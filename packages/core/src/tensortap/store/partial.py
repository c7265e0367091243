"""Pieces that are summands: adding them up over the groups their placement names."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from tensortap.errors import RunError
from tensortap.store.pieces import Piece, geometry


def sum_partial(pieces: Sequence[Piece]) -> list[Piece]:
    """`pieces` with every complete set of summands replaced by its sum.

    Summands belong together when they lie at the same place and their ranks differ in nothing
    but the named groups. The sum is taken in float64 (integers: int64), in the order of the
    group, and rounded once. Raises `RunError` naming the summands that are missing.
    """
    whole = [piece for piece in pieces if not _groups(piece)]
    sets: dict[Hashable, list[Piece]] = {}
    for piece in pieces:
        if _groups(piece):
            sets.setdefault(_set_of(piece), []).append(piece)
    return whole + [_sum(members) for members in sets.values()]


def _groups(piece: Piece) -> tuple[str, ...]:
    return piece.placement.partial if piece.placement is not None else ()


def _set_of(piece: Piece) -> Hashable:
    groups = _groups(piece)
    summed = {f"{group}_rank" for group in groups}
    others = tuple(
        sorted(
            (key, place)
            for key, place in piece.parallel.items()
            if key.endswith("_rank") and key not in summed
        )
    )
    return geometry(piece), groups, others


def _sum(members: list[Piece]) -> Piece:
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
    ordered = [found[place] for place in sorted(found)]
    return replace(ordered[0], tensor=_add([piece.tensor for piece in ordered]))


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
