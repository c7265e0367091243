"""A logical tensor that is put together where it is read, so that its size does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tensortap.errors import RunError
from tensortap.records import Part, Placement, Segment, TensorRecord
from tensortap.store.assembly import assemble, describe
from tensortap.store.cutting import cut, overlaps, require_one, take, wanted_segments
from tensortap.store.pieces import Geometry, Piece, geometry

Box = Sequence[tuple[int, int]]
"""(start, stop) on every axis."""


class LogicalTensor:
    """One tensor at one moment: its pieces, mapped but not read, and how they fit together.

    `shape` is that of the whole, or of the part asked for, with padding cut off if that was asked
    for. Made by `Run.logical`.
    """

    def __init__(
        self,
        records: Sequence[TensorRecord],
        pieces: Sequence[Piece],
        part: Part | None,
        *,
        alone: bool,
        padded: bool,
    ) -> None:
        self.records = tuple(records)
        self._pieces = list(pieces)
        self._part = part
        self._alone = alone
        self._padded = padded
        self._placement = require_one([piece.placement for piece in pieces])
        self._places: list[Geometry] = []
        if not self._bare:
            self._places = [geometry(piece) for piece in pieces]
        self._wanted = self._segments()
        self.shape = tuple(sum(length for _, length in runs) for runs in self._wanted)

    @property
    def dtype(self) -> torch.dtype:
        """That of the pieces."""
        return self._pieces[0].tensor.dtype

    @property
    def dims(self) -> str | None:
        """The names of the axes, where the record has them."""
        return self.records[0].dims

    @property
    def _bare(self) -> bool:
        """Is it a single piece as it is: one that nobody can place, or that has no placement?"""
        if self._placement is None:
            return len(self._pieces) == 1
        return self._alone and self._placement.unknown

    def tensor(self) -> torch.Tensor:
        """All of it; a single piece that is the whole is not copied.

        Raises `RunError` when pieces disagree where they overlap, or leave holes.
        """
        if self._bare:
            return self._pieces[0].tensor
        place = self._places[0]
        whole = self._pieces[0].tensor if self._alone else assemble(self._pieces)
        if not self._alone:
            place = geometry(Piece(0, whole, None, {}))
        return cut(whole, place, self._placement, self._part, padded=self._padded)

    def read(self, box: Box) -> torch.Tensor:
        """A box of it, put together from what the pieces hold there; raises `RunError`."""
        if self._bare or (self._alone and len(self._pieces) == 1):
            return self.tensor()[tuple(slice(*edges) for edges in box)]
        wanted = [_within(runs, *edges) for runs, edges in zip(self._wanted, box, strict=True)]
        held = [
            found
            for piece, place in zip(self._pieces, self._places, strict=True)
            if (found := _restricted(piece, place, wanted)) is not None
        ]
        if not held:
            raise RunError(f"nothing was captured of {describe(list(box))}; ask for one with rank=")
        return assemble(held)

    def _segments(self) -> list[list[Segment]]:
        """The stretches of every logical axis that were asked for, in order."""
        if self._bare:
            return [[(0, size)] for size in self._pieces[0].tensor.shape]
        if self._alone:
            return [[(0, size)] for size in self.tensor().shape]
        logical = self._places[0].logical
        return wanted_segments(logical, self._placement, self._part, padded=self._padded)


def _within(runs: Sequence[Segment], start: int, stop: int) -> list[Segment]:
    """Positions start to stop of the stretches laid end to end."""
    found, at = [], 0
    for begin, length in runs:
        first, last = max(start, at), min(stop, at + length)
        if first < last:
            found.append((begin + first - at, last - first))
        at += length
    return found


def _restricted(piece: Piece, place: Geometry, wanted: Sequence[Sequence[Segment]]) -> Piece | None:
    """What a piece holds of the wanted stretches, placed in the box that they make."""
    tensor, segments = piece.tensor, {}
    for axis, (runs, held) in enumerate(zip(wanted, place.axes, strict=True)):
        pairs = overlaps(runs, held)
        if not pairs and runs:
            return None
        tensor = take(tensor, axis, [local for _, local in pairs])
        segments[axis] = tuple(segment for segment, _ in pairs)
    shape = tuple(sum(length for _, length in runs) for runs in wanted)
    partial = piece.placement.partial if piece.placement is not None else ()
    return replace(piece, tensor=tensor, placement=Placement(shape, segments, partial=partial))
