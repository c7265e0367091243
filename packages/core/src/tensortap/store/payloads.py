"""Payload bytes of one rank: each distinct content once, in shards that never grow too large."""

from __future__ import annotations

from pathlib import Path

import torch
from xxhash import xxh3_128_digest

from tensortap.records import PayloadRef, TensorRecord
from tensortap.store.disk import sync_directory
from tensortap.store.dtypes import STORED
from tensortap.store.shards import ShardWriter, key_of

_REMEMBERED = 1 << 18
"""Digests kept for sharing (about 60 MiB); the one not seen for longest is forgotten first."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory as bytes, without a copy when it is contiguous on the CPU.

    Raises `ValueError` for a tensor that has no such memory.
    """
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f"a {tensor.layout} tensor on {tensor.device} has no bytes to write")
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
    # As numpy, because numpy knows uint8 while it lacks bfloat16 and all smaller floats.
    return whole.reshape(-1).view(torch.uint8).numpy().data


class PayloadWriter:
    """Stores payloads and says where; equal bytes are stored once, whatever their name."""

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        self._directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._known: dict[tuple[bytes, int], PayloadRef] = {}
        self._shard: ShardWriter | None = None
        self._shards = 0
        self._synced = 0  # shards whose names are on the disk
        self._finished = 0  # bytes of shards that are closed

    @property
    def nbytes(self) -> int:
        """Bytes on disk so far."""
        return self._finished + (self._shard.end if self._shard else 0)

    def put(self, record: TensorRecord, shape: tuple[int, ...], payload: memoryview) -> PayloadRef:
        """Where the bytes of `payload` lie; written now unless they are there already."""
        digest = xxh3_128_digest(payload)
        key = (digest, len(payload))
        # Taken out and put back: the dictionary's order is the order of last use.
        ref = self._known.pop(key, None) or self._append(record, shape, payload, digest.hex())
        self._known[key] = ref
        if len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]
        return ref

    def _append(
        self, record: TensorRecord, shape: tuple[int, ...], payload: memoryview, digest: str
    ) -> PayloadRef:
        stored = STORED[record.dtype]
        key = key_of(str(record.name), record.seq)
        seen = (*shape, *stored.trailing)
        shard = self._with_room(key, seen, len(payload))
        offset = shard.append(key, stored.word, seen, payload)
        return PayloadRef(shard.name, offset, len(payload), digest)

    def _with_room(self, key: str, shape: tuple[int, ...], nbytes: int) -> ShardWriter:
        if self._shard is not None and not self._shard.fits(
            key, shape, nbytes, self._max_shard_bytes
        ):
            self.close()
        if self._shard is None:
            self._shard = ShardWriter(self._directory, self._shards)
            self._shards += 1
        return self._shard

    def sync(self) -> None:
        """Force what was written so far to the disk."""
        if self._shard is not None:
            self._shard.sync()
        if self._synced != self._shards:
            sync_directory(self._directory)  # or a new shard's name could be lost
            self._synced = self._shards

    def close(self) -> None:
        """Finish the open shard: from here on it is a valid safetensors file, on the disk."""
        shard, self._shard = self._shard, None
        if shard is not None:
            self._finished += shard.end
            shard.close(sync=True)
