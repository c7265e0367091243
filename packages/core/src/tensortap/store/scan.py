"""Going through records.jsonl line by line, in bounded memory, whatever the file holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tensortap.records import TensorRecord
from tensortap.store.codec import decode_record
from tensortap.store.lines import MAX_LINE, decode_line

_CHUNK = 4 << 20
_WINDOW = 1 << 16


@dataclass(frozen=True, slots=True)
class Line:
    """One complete line: where it is, and its bytes without the newline (clipped when absurd)."""

    offset: int
    length: int
    text: bytes

    def decode(self, rank: int) -> TensorRecord:
        """The record; raises `ValueError` saying what is wrong with the line."""
        return decode_of_rank(self.text, rank)


def decode_of_rank(text: bytes, rank: int) -> TensorRecord:
    """The record of a line of this rank; raises `ValueError` saying what is wrong with it."""
    record = decode_record(decode_line(text))
    if record.at.rank != rank:
        raise ValueError(f"a record of rank {record.at.rank} in the directory of rank {rank}")
    return record


def lines_of(descriptor: int, start: int, size: int) -> Iterator[Line]:
    """Complete lines from `start`; bytes after the last newline before `size` are left out."""
    offset = position = start
    head = b""  # of a line that began in an earlier chunk, at most a little over MAX_LINE
    while position < size:
        chunk = os.pread(descriptor, min(_CHUNK, size - position), position)
        if not chunk:
            return
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            length = position + end + 1 - offset
            yield Line(offset, length, head + chunk[begin:end])
            offset, begin, head = offset + length, end + 1, b""
        if len(head) <= MAX_LINE:
            head += chunk[begin:]
        position += len(chunk)


class Window:
    """Bytes of a file, with those that follow them: records in a row are read at once.

    `opened` gives a descriptor, which is not kept.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[int]]) -> None:
        self._opened = opened
        self._held = (0, b"")

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`, or what there is of them."""
        first, text = self._held
        if not first <= start <= first + len(text) - size:
            with self._opened() as descriptor:
                first, text = start, os.pread(descriptor, max(size, _WINDOW), start)
            self._held = first, text
        return text[start - first : start - first + size]
