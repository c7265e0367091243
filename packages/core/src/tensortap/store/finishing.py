"""Giving shards that were never closed their safetensors header, from the records alone."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tensortap.records import TensorRecord
from tensortap.store.codec import payload_shape
from tensortap.store.disk import write_all
from tensortap.store.dtypes import STORED
from tensortap.store.layout import open_regular, shard_number
from tensortap.store.shards import (
    LARGEST_ROOM,
    LOST,
    MAX_HEADER,
    Entry,
    data_start,
    encode_header,
    key_of,
    tile,
)


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of one shard."""

    changed: bool
    lost: int = 0
    """Payload bytes that no record refers to."""
    problems: tuple[str, ...] = ()


def finish_shard(path: Path, records: Iterable[TensorRecord]) -> Finished:
    """Write the header of a shard unless it has one; `records` are those whose bytes it holds.

    Raises `RunCorrupt` when the file is no regular file, `OSError` when it cannot be written.
    """
    descriptor = open_regular(path, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        said = _data_start(descriptor, size)
        if said is not None and _has_header(descriptor, said):
            return Finished(changed=False)
        entries, problems = _entries(path, records, size)
        for data in (said, data_start(shard_number(path.name))):
            if data is not None and _possible(data, entries, size):
                return _write_header(descriptor, entries, data, max(size, data), problems)
        return Finished(False, size, (*problems, f"{path}: no shard, or its head is damaged"))
    finally:
        os.close(descriptor)


def _possible(data: int, entries: list[Entry], size: int) -> bool:
    """Can payloads begin at `data`: behind room for the header, and before all of them?"""
    header = encode_header(entries, data, max(size, data))
    return len(header) <= data - 8 and all(entry.start >= data for entry in entries)


def _data_start(descriptor: int, size: int) -> int | None:
    """Where the header area says that payloads begin; `None` when that cannot be."""
    head = os.pread(descriptor, 8, 0)
    if len(head) < 8:
        return None
    length: int = struct.unpack("<Q", head)[0]
    # A shard whose blank header was cut off by a kill has no payloads yet, and gets the rest.
    return 8 + length if length <= min(MAX_HEADER, max(size, LARGEST_ROOM)) else None


def _has_header(descriptor: int, data: int) -> bool:
    header = os.pread(descriptor, data - 8, 8)
    try:
        return len(header) == data - 8 and isinstance(json.loads(header), dict)
    except (ValueError, RecursionError):
        return False


def _entries(
    path: Path, records: Iterable[TensorRecord], size: int
) -> tuple[list[Entry], list[str]]:
    """Header entries in file order, those that cannot be true left out and reported."""
    entries: list[Entry] = []
    problems: list[str] = []
    seen: dict[tuple[int, int], None] = {}
    ordered = sorted(
        (record.payload.offset, record.payload.nbytes, record.seq, record)
        for record in records
        if record.payload is not None
    )
    position = 8
    for offset, nbytes, seq, record in ordered:
        end = offset + nbytes
        if (offset, nbytes) in seen:
            continue  # equal bytes are stored once, under the name of the first
        seen[offset, nbytes] = None
        if offset < position or end > size:
            problems.append(
                f"{path}: bytes {offset} to {end} of {record.name} (record {seq}) "
                + (f"are cut off at {size}" if end > size else "overlap another payload")
            )
            continue
        entries.append(_entry(record, offset, end))
        position = end
    return entries, problems


def _entry(record: TensorRecord, start: int, end: int) -> Entry:
    key = key_of(str(record.name), record.seq)
    stored = STORED.get(record.dtype)
    if stored is None:  # a dtype of a newer torch
        return Entry(key, "U8", (end - start,), start, end)
    return Entry(key, stored.word, (*payload_shape(record), *stored.trailing), start, end)


def _write_header(
    descriptor: int, entries: list[Entry], data: int, size: int, problems: list[str]
) -> Finished:
    header = encode_header(entries, data, size)
    tiles = tile(entries, data, size)
    lost = sum(part.end - part.start for part in tiles if part.key.startswith(LOST))
    os.lseek(descriptor, 0, os.SEEK_SET)
    write_all(descriptor, struct.pack("<Q", data - 8))
    write_all(descriptor, header.ljust(data - 8))
    os.fsync(descriptor)
    return Finished(True, lost, tuple(problems))
