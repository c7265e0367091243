"""Payload files: safetensors used as append-only storage.

    8 bytes     length of the header area, fixed when the file is created
    header      spaces while the shard is open, the JSON header once it is closed
    payloads    each at a multiple of 64 bytes, the gaps covered by U8 `__pad` tensors

safetensors 0.8 wants the header to begin with `{`, to be padded with spaces (never NUL), and
its tensors to cover every byte after it exactly once. An open shard is therefore no valid
safetensors file yet, but nothing of it is lost: records carry their own offsets, and from them
the header is written later (`recover`).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tensortap.store.disk import write_all
from tensortap.store.layout import shard_name

ALIGNMENT = 64
FIRST_ROOM = 64 << 10
LARGEST_ROOM = 8 << 20
MAX_HEADER = 100_000_000
"""safetensors refuses longer headers."""

LOST = "__lost"
"""Key prefix of bytes that a killed run left behind."""

_SPACES = b" " * (1 << 20)
_MAX_KEY = 1024  # a longer name is clipped, so that any key fits an empty shard
_PAD_COST = 96  # an entry of a pad, at most
_RESERVE = 512  # for `{}` and what `recover` may have to add about a lost tail


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a shard's header; `start` and `end` are offsets in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def encode(self, data: int) -> bytes:
        """`"key":{…}` with offsets from `data`, where the payloads begin."""
        value = {
            "dtype": self.dtype,
            "shape": self.shape,
            "data_offsets": (self.start - data, self.end - data),
        }
        return f"{json.dumps(self.key)}:{json.dumps(value, separators=(',', ':'))}".encode()


def filler(start: int, end: int) -> Entry:
    """Bytes that belong to no record: alignment, or what a killed run left behind."""
    kind = "__pad" if end - start < ALIGNMENT else LOST
    return Entry(f"{kind}.{start}", "U8", (end - start,), start, end)


def tile(entries: Iterable[Entry], data: int, size: int) -> list[Entry]:
    """`entries` in file order with every gap between `data` and `size` filled."""
    tiled: list[Entry] = []
    position = data
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start > position:
            tiled.append(filler(position, entry.start))
        tiled.append(entry)
        position = entry.end
    if position < size:
        tiled.append(filler(position, size))
    return tiled


def encode_header(entries: Iterable[Entry], data: int, size: int) -> bytes:
    """The JSON header of a shard whose payloads lie between `data` and `size`."""
    return b"{" + b",".join(entry.encode(data) for entry in tile(entries, data, size)) + b"}"


def key_of(name: str, seq: int) -> str:
    """The key of a payload in its shard: readable, unique by the record's number."""
    # A lone surrogate (legal in Python, not in JSON elsewhere) would make the file unreadable.
    return f"{name[:_MAX_KEY]}#{seq}".encode("utf-8", "replace").decode()


def data_start(number: int) -> int:
    """Where the payloads of this shard of a rank begin: later shards have more header room."""
    return _round_up(8 + (FIRST_ROOM << number if number < 7 else LARGEST_ROOM))


class ShardWriter:
    """Appends payloads to one new file; `fits` before every `append`."""

    def __init__(self, directory: Path, number: int) -> None:
        self.name = shard_name(number)
        self.path = directory / self.name
        self.data = data_start(number)
        self.end = self.data
        self._entries: list[Entry] = []
        self._keys: set[str] = set()
        self._header_left = self.data - 8 - _RESERVE
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._blank_header()
        except OSError:
            os.close(self._file)
            with suppress(OSError):  # the first failure is the one to report
                self.path.unlink()
            raise

    def _blank_header(self) -> None:
        length = self.data - 8
        write_all(self._file, struct.pack("<Q", length))
        for start in range(0, length, len(_SPACES)):
            write_all(self._file, _SPACES[: length - start])

    def fits(self, key: str, shape: tuple[int, ...], nbytes: int, limit: int) -> bool:
        """Is there room in the header, and below `limit` bytes (any size fits when empty)?"""
        cost = _entry_cost(key, shape)
        if not self._entries:
            return cost <= self._header_left
        return cost <= self._header_left and _round_up(self.end) + nbytes <= limit

    def append(self, key: str, dtype: str, shape: tuple[int, ...], payload: memoryview) -> int:
        """Write one payload; returns its offset in the file. On `OSError` nothing is added."""
        while key in self._keys:
            key += "~"
        start = _round_up(self.end)
        try:
            # The gap is written, not skipped: `__pad` is a tensor, and a hole may be NUL or not.
            write_all(self._file, bytes(start - self.end))
            write_all(self._file, payload)
        except OSError:
            self._rewind()
            raise
        self.end = start + len(payload)
        self._keys.add(key)
        self._entries.append(Entry(key, dtype, shape, start, self.end))
        self._header_left -= _entry_cost(key, shape)
        return start

    def _rewind(self) -> None:
        """Drop the part of a payload that a failed write left, so that the next one fits."""
        os.ftruncate(self._file, self.end)
        os.lseek(self._file, self.end, os.SEEK_SET)

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self, *, sync: bool) -> None:
        """Write the header, over spaces that are on disk already; then close the file."""
        try:
            header = encode_header(self._entries, self.data, self.end)
            os.lseek(self._file, 8, os.SEEK_SET)
            write_all(self._file, header)
            if sync:
                os.fsync(self._file)
        finally:
            os.close(self._file)


def _entry_cost(key: str, shape: tuple[int, ...]) -> int:
    """At most this many bytes of header for a tensor and the pad before it."""
    return len(json.dumps(key)) + len(str(shape)) + 100 + _PAD_COST


def _round_up(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
