"""Bringing two tensors of one meaning into one order of axes, by the names of their axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tensortap_analysis.captured.words import axes_of

Box = tuple[tuple[int, int], ...]
"""(start, stop) on every axis."""
Read = Callable[[Box], torch.Tensor]
"""Reads a box of a stored tensor."""


@dataclass(frozen=True, slots=True)
class Side:
    """How one side's axes become the common ones: split into `fine`, then permuted by `order`.

    `owner[axis]` is the axis of the stored tensor that a fine axis comes from.
    """

    fine: tuple[int, ...]
    owner: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def as_stored(cls, shape: Sequence[int]) -> Side:
        """No axis is split or moved."""
        axes = tuple(range(len(shape)))
        return cls(tuple(shape), axes, axes)

    @property
    def moves(self) -> bool:
        """Is anything split or permuted?"""
        axes = tuple(range(len(self.order)))
        return not axes == self.order == self.owner

    def read(self, read: Read, common: Box) -> torch.Tensor:
        """A box of the stored tensor, in the common order; a copy only where it lies scattered."""
        if not self.moves:
            return read(common)
        fine = [(0, 0)] * len(common)
        for axis, edges in zip(self.order, common, strict=True):
            fine[axis] = edges
        stored = [self._stretches(owner, fine) for owner in sorted(set(self.owner))]
        lengths = [stop - start for start, stop in fine]
        return _gather(read, stored).reshape(lengths).permute(self.order)

    def place(self, common: Sequence[int]) -> tuple[int, ...]:
        """Where an element of the common axes is in the stored tensor."""
        fine = [0] * len(common)
        for axis, at in zip(self.order, common, strict=True):
            fine[axis] = at
        stored = [0] * len(set(self.owner))
        for owner, size, at in zip(self.owner, self.fine, fine, strict=True):
            stored[owner] = stored[owner] * size + at
        return tuple(stored)

    def _stretches(self, owner: int, fine: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Where a box of the parts of a composite axis lies on it: contiguous stretches."""
        parts = [axis for axis, own in enumerate(self.owner) if own == owner]
        whole = len(parts)
        while whole > 1 and fine[parts[whole - 1]] == (0, self.fine[parts[whole - 1]]):
            whole -= 1
        inner = math.prod(self.fine[axis] for axis in parts[whole:])
        *outer, last = parts[:whole]
        start, stop = fine[last]
        found = []
        for places in itertools.product(*(range(*fine[axis]) for axis in outer)):
            at = 0
            for axis, place in zip(outer, places, strict=True):
                at = at * self.fine[axis] + place
            at *= self.fine[last]
            found.append(((at + start) * inner, (at + stop) * inner))
        return found


def _gather(read: Read, stretches: list[list[tuple[int, int]]]) -> torch.Tensor:
    """The boxes that stretches on several axes make, as one tensor."""
    for axis, several in enumerate(stretches):
        if len(several) > 1:
            one_by_one = ([*stretches[:axis], [one], *stretches[axis + 1 :]] for one in several)
            return torch.cat([_gather(read, each) for each in one_by_one], dim=axis)
    if not all(stretches):  # an axis without any element
        return read(tuple(some[0] if some else (0, 0) for some in stretches))
    return read(tuple(one for (one,) in stretches))


@dataclass(frozen=True, slots=True)
class Alignment:
    """Two tensors in one order of axes: that of the reference, its composite axes split."""

    shape: tuple[int, ...]
    ref: Side
    other: Side
    note: str | None = None

    @classmethod
    def as_stored(cls, shape: Sequence[int], note: str | None = None) -> Alignment:
        """Two tensors of one shape, axis by axis."""
        side = Side.as_stored(shape)
        return cls(tuple(shape), side, side, note)

    @property
    def moves(self) -> bool:
        """Does either side have to be split or permuted?"""
        return self.ref.moves or self.other.moves

    def cut(self, ref: Sequence[int], other: Sequence[int]) -> Alignment:
        """Only what both find valid: `ref` and `other` are shapes without padding.

        Axes that are folded into a composite one are left as they are.
        """
        shape = list(self.shape)
        for side, valid in ((self.ref, ref), (self.other, other)):
            for place, axis in enumerate(side.order):
                if side.owner.count(side.owner[axis]) == 1:
                    shape[place] = min(shape[place], valid[side.owner[axis]])
        return replace(self, shape=tuple(shape))

    def boxes(self, elements: int) -> Iterator[Box]:
        """Boxes of at most `elements` that follow each other in the order of the common axes."""
        room = max(1, elements)
        steps: list[int] = []
        for axis, size in enumerate(self.shape):
            inner = math.prod(self.shape[axis + 1 :])
            split = all(step == 1 for step in steps)
            steps.append(max(1, min(size, room // max(inner, 1))) if split else max(size, 1))
        cuts = [range(0, size, step) for size, step in zip(self.shape, steps, strict=True)]
        for starts in itertools.product(*cuts):
            yield tuple(
                (start, min(start + step, size))
                for start, step, size in zip(starts, steps, self.shape, strict=True)
            )


def align(
    shape: Sequence[int], dims: str | None, other_shape: Sequence[int], other_dims: str | None
) -> Alignment | str:
    """How two tensors line up, or why they cannot, as half a sentence.

    Axes are matched by their names; a composite axis such as `(head dim)` is split where the other
    side has its parts. One axis that is left over on each side is taken for the same where the
    sizes are. Without names, or with other ones, equal shapes are taken as they are.
    """
    return _aligned(tuple(shape), dims, tuple(other_shape), other_dims)


@lru_cache(maxsize=4096)
def _aligned(
    shape: tuple[int, ...], dims: str | None, other_shape: tuple[int, ...], other_dims: str | None
) -> Alignment | str:
    """`align`, once for all tensors that look alike."""
    mine, theirs = _axes(dims, shape), _axes(other_dims, other_shape)
    if mine is not None and theirs is not None:
        renamed, note = _one_name(mine, shape, theirs, other_shape)
        found = _by_names(mine, shape, renamed, other_shape, note)
        if found is not None:
            return found
    if shape == other_shape:
        return Alignment.as_stored(shape, _note(dims, other_dims))
    return f"shapes {_spelled(shape, dims)} and {_spelled(other_shape, other_dims)} do not match"


def _note(dims: str | None, other: str | None) -> str | None:
    if dims == other:
        return None
    if None in (dims, other):
        return "only one side names its axes; taken in the order they are stored in"
    return f"axes {dims!r} and {other!r}, taken as equal"


def _axes(dims: str | None, shape: Sequence[int]) -> list[str] | None:
    found = [" ".join(axis.split()) for axis in axes_of(dims)]
    return found if found and len(found) == len(shape) else None


def _parts(axis: str) -> list[str]:
    return axis.strip("()").split()


def _one_name(
    mine: list[str], shape: Sequence[int], theirs: list[str], other_shape: Sequence[int]
) -> tuple[list[str], str | None]:
    """`theirs`, where the one axis without counterpart is called as the one of mine without."""
    alone = _without_counterpart(mine, theirs)
    other_alone = _without_counterpart(theirs, mine)
    if len(alone) != 1 or len(other_alone) != 1:
        return theirs, None
    (one,), (two,) = alone, other_alone
    if shape[one] != other_shape[two]:
        return theirs, None
    renamed = [*theirs[:two], mine[one], *theirs[two + 1 :]]
    return renamed, f"axes {mine[one]!r} and {theirs[two]!r}, taken as equal"


def _without_counterpart(axes: list[str], facing: list[str]) -> list[int]:
    known = {*facing, *(part for axis in facing for part in _parts(axis))}
    return [
        number
        for number, axis in enumerate(axes)
        if axis not in known and not set(_parts(axis)) & known
    ]


def _by_names(
    mine: list[str],
    shape: Sequence[int],
    theirs: list[str],
    other_shape: Sequence[int],
    note: str | None,
) -> Alignment | None:
    sizes = dict(zip(mine, shape, strict=True)) | dict(zip(theirs, other_shape, strict=True))
    ours = _split(mine, shape, theirs, sizes)
    others = _split(theirs, other_shape, mine, sizes)
    if ours is None or others is None:
        return None
    words, fine, owner = ours
    other_words, other_fine, other_owner = others
    if sorted(words) != sorted(other_words) or len(set(words)) < len(words):
        return None
    order = tuple(other_words.index(word) for word in words)
    if [other_fine[axis] for axis in order] != fine:
        return None
    here = Side(tuple(fine), tuple(owner), tuple(range(len(fine))))
    there = Side(tuple(other_fine), tuple(other_owner), order)
    return Alignment(tuple(fine), here, there, note)


def _split(
    axes: Sequence[str], shape: Sequence[int], facing: Sequence[str], sizes: dict[str, int]
) -> tuple[list[str], list[int], list[int]] | None:
    """Words, sizes and owners of the fine axes; composites that both sides have stay whole."""
    words: list[str] = []
    fine: list[int] = []
    owner: list[int] = []
    for axis, word in enumerate(axes):
        inner, known = [word], [shape[axis]]
        if word.startswith("(") and word not in facing:
            inner = _parts(word)
            known = [sizes.get(part, 0) for part in inner]
            if math.prod(known) != shape[axis]:
                return None
        words += inner
        fine += known
        owner += [axis] * len(inner)
    return words, fine, owner


def _spelled(shape: Sequence[int], dims: str | None) -> str:
    sizes = "x".join(map(str, shape)) or "scalar"
    return f"{sizes} ({dims})" if dims else sizes
