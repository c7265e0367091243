"""index.bin and names.jsonl: a cache of records.jsonl that opens a million records at once.

    index.bin     16 bytes of head, then rows (`rows.ROW`) in the order of the lines
    names.jsonl   one checksummed line a name: its id is the number of the line

Both are derived. Whatever is missing, short, damaged or does not tile records.jsonl without a
gap is rebuilt from the lines.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tensortap.errors import RunError
from tensortap.names import TensorName
from tensortap.records import TensorRecord
from tensortap.store.codec import decode_name
from tensortap.store.disk import replace_file
from tensortap.store.fields import text
from tensortap.store.layout import INDEX, NAMES, read_small
from tensortap.store.lines import decode_line, encode_line
from tensortap.store.mapping import map_bytes
from tensortap.store.rows import ROW, Rows, intact, pack_bad_row, pack_row, seal

HEAD = struct.pack("<8sII", b"tensotap", 1, ROW.itemsize)
"""First bytes of index.bin: magic, version, bytes a row."""

EMPTY_ROWS: Rows = np.empty(0, dtype=ROW)

Named = tuple[TensorName, str]
"""A name and its native name; the index numbers these pairs."""


@dataclass(frozen=True)
class Index:
    """Rows in the order of the lines, and the names their ids stand for."""

    rows: Rows
    names: tuple[Named, ...]

    @cached_property
    def numbers(self) -> dict[str, list[int]]:
        """Name to its ids (one for each native name it had)."""
        found: dict[str, list[int]] = {}
        for number, (name, _) in enumerate(self.names):
            found.setdefault(str(name), []).append(number)
        return found

    @cached_property
    def _by_name(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Positions sorted by name id, and where each id begins among them."""
        order = np.argsort(self.rows["name"], kind="stable")
        ids = np.arange(len(self.names) + 2)
        return order, np.searchsorted(self.rows["name"][order], ids)

    def positions(self, number: int) -> npt.NDArray[np.intp]:
        """Rows of one name id, in the order of the lines."""
        order, begins = self._by_name
        return order[begins[number] : begins[number + 1]]

    @property
    def covered(self) -> int:
        """How many bytes of records.jsonl the rows account for."""
        return int(self.rows[-1]["offset"]) + int(self.rows[-1]["length"]) if len(self.rows) else 0


class IndexBuilder:
    """Collects rows line by line; `rows` and `names` hand over what is new since the last call."""

    def __init__(self, known: Index | None = None) -> None:
        self._ids: dict[Named, int] = {}
        self._packed = bytearray()
        self._new: list[Named] = []
        self.lines = 0
        if known is not None:
            self._ids = {named: number for number, named in enumerate(known.names)}
            self.lines = len(known.rows)

    def add(self, record: TensorRecord, offset: int, length: int) -> None:
        """Take one record; hot. Raises `struct.error` for a value that does not fit a row."""
        named = (record.name, record.native)
        number = self._ids.get(named, len(self._ids))
        self._packed += pack_row(record, number, offset, length, self.lines + 1)
        if number == len(self._ids):
            self._ids[named] = number
            self._new.append(named)
        self.lines += 1

    def add_bad(self, offset: int, length: int) -> None:
        """Take one line that cannot be read."""
        self.lines += 1
        self._packed += pack_bad_row(offset, length, self.lines)

    def take_rows(self) -> bytes:
        """Sealed rows added since the last call."""
        rows = seal(self._packed)
        self._packed.clear()
        return rows

    def take_names(self) -> bytes:
        """Lines of names.jsonl for the names that are new since the last call."""
        lines = _name_lines(self._new)
        self._new.clear()
        return lines

    def index(self, known: Index | None = None) -> Index:
        """`known` and everything added since, as one index in memory."""
        rows = np.frombuffer(self.take_rows(), dtype=ROW)
        if known is not None:
            rows = np.concatenate([known.rows, rows])
        return Index(rows, tuple(self._ids))


def load_index(directory: Path, size: int) -> Index | None:
    """The stored index of `size` bytes of records, or `None` where it cannot be trusted.

    It may be short (a step that had not ended): `Index.covered` says how far it goes.
    """
    try:
        names = _load_names(directory / NAMES)
        rows = _within(_map_rows(directory / INDEX), size)
    except (FileNotFoundError, RunError, ValueError):
        return None  # derived data: whatever is wrong with it, the lines have the truth
    index = Index(rows, names)
    return index if _tiles(index, size) and intact(rows) else None


def stored_index_is_whole(directory: Path, size: int) -> bool:
    """Does the stored index account for every byte of records, but for half a line?"""
    index = load_index(directory, size)
    if index is None or index.covered != size:
        return False
    return count_rows(directory / INDEX) == len(index.rows)


def save_index(directory: Path, index: Index) -> None:
    """Replace both files of the index; raises `OSError`."""
    # Names first: more names than rows use are harmless, fewer would not be.
    replace_file(directory / NAMES, _name_lines(index.names), sync=True)
    replace_file(directory / INDEX, HEAD + index.rows.tobytes(), sync=True)


def count_rows(path: Path) -> int:
    """How many rows index.bin has, whatever they say; raises as `load_index` does not."""
    return len(_map_rows(path))


def _name_lines(names: Iterable[Named]) -> bytes:
    return b"".join(encode_line({"name": str(name), "native": native}) for name, native in names)


def _load_names(path: Path) -> tuple[Named, ...]:
    lines = read_small(path).split(b"\n")
    # A half line at the end belongs to rows that were not written yet.
    fields = [decode_line(line) for line in lines[:-1]]
    return tuple((decode_name(text(line, "name")), text(line, "native")) for line in fields)


def _map_rows(path: Path) -> Rows:
    data = map_bytes(path, 0).numpy()
    if data[: len(HEAD)].tobytes() != HEAD:
        raise ValueError("not an index of this version")
    count = (len(data) - len(HEAD)) // ROW.itemsize
    end = len(HEAD) + count * ROW.itemsize
    return np.frombuffer(data[len(HEAD) : end].data, dtype=ROW) if count else EMPTY_ROWS


def _within(rows: Rows, size: int) -> Rows:
    """The rows whose lines are among the first `size` bytes: a live run grows while it is read."""
    ends = rows["offset"] + rows["length"].astype(np.int64)
    return rows[: int(np.searchsorted(ends, size, side="right"))]


def _tiles(index: Index, size: int) -> bool:
    """Do the rows account for every byte and line up to `covered`, with known names?"""
    rows = index.rows
    ends = rows["offset"] + rows["length"].astype(np.int64)
    return bool(
        index.covered <= size
        and np.array_equal(rows["offset"], np.concatenate([[0], ends])[:-1])
        and np.array_equal(rows["line"], np.arange(1, len(rows) + 1))
        and (len(rows) == 0 or int(rows["name"].max()) < max(len(index.names), 1))
    )
