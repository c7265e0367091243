"""Folders of `torch.distributed.checkpoint` (`.metadata` and `.distcp` files), chunk by chunk."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from tensortap_analysis.weights.sources.mapped import repeats
from tensortap_analysis.weights.sources.metadata import Plain, read_metadata
from tensortap_analysis.weights.sources.source import (
    CheckpointError,
    Entry,
    Listing,
    Skipped,
    plain_name,
    regular,
)

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor, and the bytes of a file that hold it as `torch.save` wrote it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    length: int

    def read(self) -> torch.Tensor:
        """The values; raises `CheckpointError` where the bytes are not what they should be."""
        try:
            with self.path.open("rb") as file:
                part = _Slice(file, self.start, self.length)
                values = torch.load(cast(IO[bytes], part), map_location="cpu", weights_only=True)
        except Exception as failure:
            first = (str(failure).splitlines() or [type(failure).__name__])[0]
            raise CheckpointError(
                f"{self.path}: bytes {self.start} to {self.start + self.length} are no tensor: "
                f"{first}."
            ) from None
        if not isinstance(values, torch.Tensor) or not self._is_held_by(values):
            raise CheckpointError(
                f"{self.path}: bytes {self.start} to {self.start + self.length} should hold a "
                f"tensor of {self.sizes}, and do not."
            )
        return values.detach()

    def _is_held_by(self, values: torch.Tensor) -> bool:
        plain = values.layout == torch.strided and tuple(values.shape) == self.sizes
        return plain and not repeats(values)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a distributed checkpoint, in chunks."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def read(self, index: int | None = None) -> torch.Tensor:
        """All of it, or its slice `index` of the first axis, from the chunks that hold it."""
        at = () if index is None else (index,)
        shape = self.shape[len(at) :]
        needed = [chunk for chunk in self.chunks if _covers(chunk, index)]
        whole: torch.Tensor | None = None
        for chunk in needed:
            values = chunk.read()
            values = values if index is None else values[index - chunk.offsets[0]]
            if tuple(values.shape) == shape:
                return values
            if whole is None:
                whole = torch.empty(shape, dtype=self.dtype)
            box = zip(chunk.offsets[len(at) :], values.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in box)] = values
        return torch.empty(shape, dtype=self.dtype) if whole is None else whole


def listing(folder: Path) -> Listing:
    """The tensors of a folder; what is no weight (optimizer, extra state) is skipped, and said."""
    tensors, skipped, files = stored(folder)
    entries = (Entry(one.name, one.shape, one.dtype, _loader(one)) for one in tensors)
    return Listing(tuple(entries), files, skipped)


def stored(folder: Path) -> tuple[list[Stored], tuple[Skipped, ...], tuple[Path, ...]]:
    """Tensors in the order they were saved, what is left out, and the files that hold them.

    Raises `CheckpointError` for a `.metadata` that is broken or no description of a checkpoint,
    for files that are missing or too short, and for chunks that do not fill their tensor.
    """
    path = folder / METADATA
    described, places = read_metadata(path)
    chunks = _places(folder, places)
    tensors, skipped = [], []
    for name, facts in described.items():
        if is_optimizer(name):
            skipped.append(Skipped(name, "state of the optimizer"))
        elif not hasattr(facts, "chunks"):
            skipped.append(Skipped(name, "no tensor"))
        else:
            tensors.append(_stored(name, facts, chunks.get(name, {}), path))
    used = {chunk.path for one in tensors for chunk in one.chunks}
    return tensors, tuple(skipped), (regular(path), *sorted(used))


def is_optimizer(name: str) -> bool:
    """Is this the name of a moment or master copy of an optimizer?"""
    words = name.split(".")
    return words[0] in ("optimizer", "optim", "optimizers") or "exp_avg" in words


def _loader(tensor: Stored) -> Callable[[], torch.Tensor]:
    return lambda: tensor.read()


def _covers(chunk: Chunk, index: int | None) -> bool:
    return index is None or chunk.offsets[0] <= index < chunk.offsets[0] + chunk.sizes[0]


def _places(folder: Path, places: Mapping[Any, Any]) -> dict[str, dict[Any, Plain]]:
    """Where each chunk lies: by the tensor's name, then by its offset in the tensor."""
    found: dict[str, dict[Any, Plain]] = {}
    for index, place in places.items():
        offset = getattr(index, "offset", None)
        found.setdefault(str(index.fqn), {})[None if offset is None else tuple(offset)] = place
    return found


def _stored(name: str, facts: Any, places: Mapping[Any, Any], metadata: Path) -> Stored:
    try:
        dtype = facts.properties.state[0]
        shape = sizes(facts.size)
        boxes = [(sizes(chunk.offsets), sizes(chunk.sizes)) for chunk in facts.chunks]
    except (AttributeError, TypeError, ValueError, IndexError) as failure:
        raise CheckpointError(f"{metadata} does not describe {name!r}: {failure}.") from None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{metadata} gives {name!r} no dtype of torch.")
    _check_boxes(name, shape, boxes, metadata)
    chunks = [_chunk(name, box, places, metadata) for box in boxes]
    return Stored(name, shape, dtype, tuple(chunks))


def sizes(given: Sequence[Any]) -> tuple[int, ...]:
    """Numbers of elements; raises `ValueError` for anything else."""
    found = tuple(given)
    if any(type(size) is not int or size < 0 for size in found):
        raise ValueError(f"{found} are no sizes")
    return found


def _check_boxes(
    name: str,
    shape: tuple[int, ...],
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    metadata: Path,
) -> None:
    """Chunks lie inside the tensor and fill it; each place once."""
    filled = 0
    for offsets, size in boxes:
        if len(offsets) != len(shape) or len(size) != len(shape):
            raise CheckpointError(f"{metadata}: a chunk of {name!r} has not the axes of {shape}.")
        inside = all(o + s <= whole for o, s, whole in zip(offsets, size, shape, strict=True))
        if not inside:
            raise CheckpointError(f"{metadata}: a chunk of {name!r} lies outside of {shape}.")
        filled += math.prod(size)
    if filled != math.prod(shape) or _overlap(boxes):
        raise CheckpointError(
            f"{metadata}: the chunks of {name!r} do not fill {shape} without overlapping. "
            "The checkpoint was not saved whole."
        )


def _overlap(boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Do any two boxes have a place in common?"""
    if len(boxes) < 2 or not boxes[0][0]:
        return len(boxes) > 1
    start = torch.tensor([offsets for offsets, _ in boxes])
    end = start + torch.tensor([size for _, size in boxes])
    return any(
        bool(((start[at] < end[at + 1 :]) & (start[at + 1 :] < end[at])).all(dim=1).any())
        for at in range(len(boxes) - 1)
    )


def _chunk(
    name: str,
    box: tuple[tuple[int, ...], tuple[int, ...]],
    places: Mapping[Any, Any],
    metadata: Path,
) -> Chunk:
    place = places.get(box[0], places.get(None))
    if place is None:
        raise CheckpointError(f"{metadata} does not say where {name!r} lies.")
    if getattr(place, "transform_descriptors", None):
        raise CheckpointError(
            f"{metadata}: {name!r} is compressed ({place.transform_descriptors}); save it plain."
        )
    path = regular(metadata.parent / plain_name(getattr(place, "relative_path", None), metadata))
    start, length = getattr(place, "offset", None), getattr(place, "length", None)
    if type(start) is not int or type(length) is not int or start < 0 or length < 0:
        raise CheckpointError(f"{metadata} does not say where in {path.name} {name!r} lies.")
    if start + length > path.stat().st_size:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, and {name!r} lies at {start:,} to "
            f"{start + length:,}: the file was cut, or its copy was."
        )
    return Chunk(*box, path, start, length)


class _Slice(io.RawIOBase):
    """Some bytes of an open file as a file: what torch.load reads from without a copy of them."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        # Views are given back even when reading fails: the caller frees the buffer behind them.
        with memoryview(buffer) as whole, whole.cast("B") as view:
            wanted = min(len(view), max(self._length - self._at, 0))
            self._file.seek(self._start + self._at)
            with view[:wanted] as part:
                got = int(self._file.readinto(part))
        self._at += got
        return got
