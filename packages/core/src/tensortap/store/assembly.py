"""Putting the pieces of all ranks together into the logical tensor, by their placements.

Every axis of the logical tensor is cut where some piece begins or ends; the cells of that grid
are what pieces hold, share or leave out. All bookkeeping is on the grid; values are only moved
and compared, as bytes, so that any dtype and any NaN is served.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from tensortap.errors import RunConflict, RunError
from tensortap.store.partial import sum_partial
from tensortap.store.pieces import Geometry, Piece, Stretch, from_bytes, geometry, raw_bytes

Box = tuple[Stretch, ...]
"""One stretch on every axis."""

_MOST_CELLS = 1 << 22  # limits for placements from a hostile file, far above any real one
_MOST_BOXES = 1 << 18
_MOST_AXES = 30
_NOBODY = -1


def assemble(pieces: Sequence[Piece]) -> torch.Tensor:
    """The logical tensor; a single piece that is all of it is returned as it is, not copied.

    Raises `RunConflict` when pieces disagree where they overlap (bitwise), `RunError` when some
    part of the tensor is in no piece, or when a placement does not fit its piece.
    """
    pieces = sum_partial(pieces)
    places = [geometry(piece) for piece in pieces]
    _require_agreement(pieces, places)
    if len(pieces) == 1 and _is_all(places[0]):
        return pieces[0].tensor
    grid = _Grid(places)
    grid.require_complete(pieces)
    first = next((n for n, place in enumerate(places) if _is_all(place)), None)
    out = (
        torch.empty((*places[0].logical, pieces[0].tensor.element_size()), dtype=torch.uint8)
        if first is None
        else raw_bytes(pieces[first].tensor)
    )
    canvas = _Canvas(out, grid, pieces, first)
    for number, place in enumerate(places):
        if number != first:
            canvas.add(number, place)
    return from_bytes(out, pieces[0].tensor.dtype) if first is None else pieces[first].tensor


def _require_agreement(pieces: Sequence[Piece], places: Sequence[Geometry]) -> None:
    for what, found in (
        ("dtype", [str(piece.tensor.dtype) for piece in pieces]),
        ("logical shape", [place.logical for place in places]),
    ):
        if len(set(found)) > 1:
            listed = ", ".join(
                f"rank {piece.rank}: {word}" for piece, word in zip(pieces, found, strict=True)
            )
            raise RunConflict(f"pieces differ in {what} ({listed}); ask with rank= or dp_rank=")


def _is_all(place: Geometry) -> bool:
    return place.axes == tuple((Stretch(0, size, 0),) for size in place.logical)


class _Grid:
    """The logical tensor cut at every border of every piece, and who filled which cell."""

    def __init__(self, places: Sequence[Geometry]) -> None:
        self._cuts = [_cuts(size, axis, places) for axis, size in enumerate(places[0].logical)]
        self._shape = tuple(len(cuts) - 1 for cuts in self._cuts)
        boxes = sum(math.prod(map(len, place.axes)) for place in places)
        if math.prod(self._shape) > _MOST_CELLS or boxes > _MOST_BOXES:
            raise RunError("the placements cut the tensor into too many cells to assemble")
        if len(self._shape) > _MOST_AXES:
            raise RunError(f"a tensor of {len(self._shape)} axes is not assembled; ask with rank=")
        self._places = places
        self.owner = np.full(self._shape, _NOBODY, dtype=np.int32)

    def block(self, box: Box) -> tuple[slice, ...]:
        """The cells of a box."""
        return tuple(
            slice(cuts.index(part.start), cuts.index(part.start + part.length))
            for cuts, part in zip(self._cuts, box, strict=True)
        )

    def cells(self, box: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
        """Every cell of a box, as its index and as a box of its own."""
        block = self.block(box)
        for index in itertools.product(*(range(part.start, part.stop) for part in block)):
            yield (
                index,
                tuple(
                    cuts.cell(number, part)
                    for cuts, number, part in zip(self._cuts, index, box, strict=True)
                ),
            )

    def require_complete(self, pieces: Sequence[Piece]) -> None:
        """Raise `RunError` listing the first few stretches that no piece holds."""
        held = np.zeros(self._shape, dtype=bool)
        for place in self._places:
            for box in itertools.product(*place.axes):
                held[self.block(box)] = True
        missing = np.argwhere(~held)
        if not held.all():
            holes = [self._describe(tuple(index)) for index in missing[:4]]
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            ranks = sorted({piece.rank for piece in pieces})
            raise RunError(
                f"nothing was captured of {'; '.join(holes)}{more} (pieces are there of ranks "
                f"{ranks}); ask for one piece with rank="
            )

    def _describe(self, index: tuple[int, ...]) -> str:
        return describe([cuts.span(number) for cuts, number in zip(self._cuts, index, strict=True)])


def describe(spans: Sequence[tuple[int, int]]) -> str:
    """`[0:4, 8:16]`, the way it is indexed."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in spans) + "]"


class _Cuts:
    """The borders on one axis."""

    def __init__(self, borders: Sequence[int]) -> None:
        self._borders = borders
        self._number = {border: number for number, border in enumerate(borders)}

    def __len__(self) -> int:
        return len(self._borders)

    def index(self, border: int) -> int:
        return self._number[border]

    def span(self, number: int) -> tuple[int, int]:
        return int(self._borders[number]), int(self._borders[number + 1])

    def cell(self, number: int, part: Stretch) -> Stretch:
        """One cell of a stretch, as a stretch."""
        start, stop = self.span(number)
        return Stretch(start, stop - start, part.local + start - part.start)


def _cuts(size: int, axis: int, places: Sequence[Geometry]) -> _Cuts:
    borders = {0, size}
    for place in places:
        for part in place.axes[axis]:
            borders |= {part.start, part.start + part.length}
    return _Cuts(sorted(borders))


class _Canvas:
    """The bytes of the logical tensor while pieces are laid onto it."""

    def __init__(
        self, out: torch.Tensor, grid: _Grid, pieces: Sequence[Piece], first: int | None
    ) -> None:
        self._out = out
        self._grid = grid
        self._pieces = pieces
        if first is not None:
            grid.owner[...] = first

    def add(self, number: int, place: Geometry) -> None:
        """Lay down one piece: copy where nothing lies yet, compare where something does."""
        raw = raw_bytes(self._pieces[number].tensor)
        for box in itertools.product(*place.axes):
            block = self._grid.block(box)
            owners: npt.NDArray[np.int32] = self._grid.owner[block]
            if (owners == _NOBODY).all():
                self._out[_logical(box)] = raw[_local(box)]
                self._grid.owner[block] = number
            elif (owners == _NOBODY).any() or not self._agrees(raw, box):
                self._add_cells(number, raw, box)

    def _add_cells(self, number: int, raw: torch.Tensor, box: Box) -> None:
        for index, cell in self._grid.cells(box):
            owner = int(self._grid.owner[index])
            if owner == _NOBODY:
                self._out[_logical(cell)] = raw[_local(cell)]
                self._grid.owner[index] = number
            elif not self._agrees(raw, cell):
                raise self._disagreement(owner, number, raw, cell)

    def _agrees(self, raw: torch.Tensor, box: Box) -> bool:
        return torch.equal(self._out[_logical(box)], raw[_local(box)])

    def _disagreement(self, one: int, other: int, raw: torch.Tensor, cell: Box) -> RunConflict:
        dtype = self._pieces[one].tensor.dtype
        theirs = from_bytes(self._out[_logical(cell)], dtype)
        ours = from_bytes(raw[_local(cell)], dtype)
        spans = describe([(part.start, part.start + part.length) for part in cell])
        return RunConflict(
            f"ranks {self._pieces[one].rank} and {self._pieces[other].rank} both hold {spans} "
            f"and disagree there: {_difference(theirs, ours)}. Pieces are never averaged; ask "
            "for one with rank= or dp_rank="
        )


def _difference(one: torch.Tensor, other: torch.Tensor) -> str:
    """How far apart two tensors of equal shape are, as well as their dtype lets us say."""
    try:
        wide = torch.complex128 if one.dtype.is_complex else torch.float64
        apart = (one.to(wide) - other.to(wide)).abs()
    except RuntimeError:  # a packed dtype, which has no arithmetic
        return "their bytes differ"
    if bool(apart.isnan().any()):
        return "one holds NaN or infinity where the other holds something else"
    return f"the largest difference is {float(apart.max()):.6g}"


def _logical(box: Box) -> tuple[slice, ...]:
    return tuple(slice(part.start, part.start + part.length) for part in box)


def _local(box: Box) -> tuple[slice, ...]:
    return tuple(slice(part.local, part.local + part.length) for part in box)
