"""The rows of index.bin: what is needed to find a record, and its statistics, at fixed width.

A row is derived from its record line and proves itself by a 64-bit hash, so that a bit flip in
an index of a million rows is found in one vectorised pass.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from tensortap.records import TensorRecord

Rows = npt.NDArray[np.void]
"""A one-dimensional structured array of `ROW`."""

RECOMPUTE, EVAL, STATISTICS, PAYLOAD, FULL, SAMPLE, PARTS, BAD = (1 << bit for bit in range(8))
"""Bits of `flags`; `BAD` marks a line that cannot be read, so that it is not silently absent."""

ROW = np.dtype(
    [
        ("name", "<u4"), ("flags", "<u4"), ("step", "<i8"), ("microbatch", "<u4"), ("call", "<u4"),
        ("dtype", "S16"), ("count", "<i8"), ("nan", "<i8"), ("posinf", "<i8"), ("neginf", "<i8"),
        ("zero", "<i8"), ("min", "<f8"), ("max", "<f8"), ("absmax", "<f8"), ("mean", "<f8"),
        ("std", "<f8"), ("rms", "<f8"), ("l1", "<f8"), ("l2", "<f8"), ("seq", "<i8"),
        ("offset", "<i8"), ("length", "<u4"), ("line", "<u4"), ("check", "<u8"),
    ]
)  # fmt: skip
_PACK = struct.Struct("<IIQII16s5Q8dQQIIQ")  # unsigned: a negative number is refused
_NAN = float("nan")
_NOTHING = (0, 0, 0, 0, 0, *[_NAN] * 8)
_BLOCK = 1 << 16  # rows hashed at once: bounds the temporary memory


def pack_row(record: TensorRecord, name: int, offset: int, length: int, line: int) -> bytes:
    """The row of a record at `offset` of records.jsonl, its hash still zero; hot.

    Raises `struct.error` for a coordinate or count that does not fit.
    """
    at = record.at
    stats = record.stats
    numbers = _NOTHING if stats is None else (
        stats.count, stats.nan, stats.posinf, stats.neginf, stats.zero,
        *[_NAN if value is None else value for value in (
            stats.min, stats.max, stats.absmax, stats.mean,
            stats.std, stats.rms, stats.l1, stats.l2,
        )],
    )  # fmt: skip
    return _PACK.pack(
        name, flags_of(record), at.step, at.microbatch, at.call, record.dtype.encode()[:16],
        *numbers, record.seq, offset, length, line, 0,
    )  # fmt: skip


def flags_of(record: TensorRecord) -> int:
    """The record's bits in a row."""
    placement = record.placement
    return (
        (RECOMPUTE if record.at.recompute else 0)
        | (EVAL if record.at.eval else 0)
        | (STATISTICS if record.stats is not None else 0)
        | (PAYLOAD if record.payload is not None else 0)
        | (FULL if record.values == "full" else SAMPLE if record.values == "sample" else 0)
        | (PARTS if placement is not None and placement.parts else 0)
    )


def pack_bad_row(offset: int, length: int, line: int) -> bytes:
    """The row of a line that cannot be read."""
    clipped = min(length, (1 << 32) - 1)
    return _PACK.pack(0, BAD, 0, 0, 0, b"", *_NOTHING, 0, offset, clipped, line, 0)


def seal(packed: bytes | bytearray) -> bytes:
    """Packed rows with their hashes filled in."""
    rows: Rows = np.frombuffer(bytearray(packed), dtype=ROW)
    rows["check"] = _hashes(rows)
    return bytes(rows.tobytes())


def intact(rows: Rows) -> bool:
    """Do all rows match their hashes?"""
    blocks = (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))
    return all(np.array_equal(block["check"], _hashes(block)) for block in blocks)


def _hashes(rows: Rows) -> npt.NDArray[np.uint64]:
    """Multiply-xorshift over the 64-bit words of each row, all rows at once."""
    words = np.frombuffer(rows.tobytes(), dtype="<u8").reshape(len(rows), ROW.itemsize // 8)
    state = np.full(len(rows), 0x9E3779B97F4A7C15, dtype=np.uint64)
    for column in words.T[:-1]:
        state = (state ^ column) * np.uint64(0xFF51AFD7ED558CCD)
        state ^= state >> np.uint64(32)
    return state


def same_row(row: np.void, packed: bytes) -> bool:
    """Is this row of the index the packed row, hash aside?"""
    return row.tobytes()[:-8] == packed[:-8]
