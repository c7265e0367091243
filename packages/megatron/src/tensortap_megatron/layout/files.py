"""One `.pt` file: the old fork's dictionary of `tensor`, `tensor_info` and `metadata`.

`metadata` has the fork's keys (layer_type, operation, quant_type, tensor_name, layer_idx,
save_time) and, beside them, the fields of the record: what an import needs to make the run again.
"""

from __future__ import annotations

import json
import os
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import CaptureError, NotSupported, RunError
from tensortap.records import Coordinates, Statistics, TensorRecord
from tensortap.stats import statistics
from tensortap.store.codec import decode_record, encode_record, payload_shape
from tensortap.store.dtypes import STORED, dtype_name
from tensortap.store.payloads import bytes_of
from tensortap_megatron.layout.words import OldName, canonical

VERSION = 1
"""Of the record's fields in `metadata`; a reader refuses one it does not know."""


def write_file(path: Path, old: OldName, record: TensorRecord, payload: torch.Tensor) -> None:
    """Write one tensor; `path` is there whole or not at all. Raises `CaptureError`."""
    # A copy: torch.save would write all the memory behind a view.
    tensor = payload.clone()
    content = {
        "tensor": tensor,
        "tensor_info": _tensor_info(record, tensor),
        "metadata": _metadata(old, record, tensor),
    }
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as file:
            torch.save(content, file)
        os.replace(draft, path)
    except (OSError, RuntimeError) as failure:  # RuntimeError: how torch reports a full disk
        raise CaptureError(f"{path} could not be written: {failure}.") from failure
    finally:
        draft.unlink(missing_ok=True)


def _tensor_info(record: TensorRecord, tensor: torch.Tensor) -> dict[str, Any]:
    """The fork's description of the tensor; over finite values, 0.0 where there are none."""
    stats = record.stats or _statistics(tensor)
    return {
        "shape": list(record.shape),
        "dtype": f"torch.{record.dtype}",
        "device": record.device,
        "min": _number(stats.min if stats else None),
        "max": _number(stats.max if stats else None),
        "mean": _number(stats.mean if stats else None),
        "std": _unbiased(stats),
    }


def _number(value: float | None) -> float:
    return 0.0 if value is None else float(value)


def _unbiased(stats: Statistics | None) -> float:
    """The sample standard deviation, which is what `Tensor.std` gave the fork."""
    if stats is None or stats.std is None or stats.finite < 2:
        return 0.0
    return float(stats.std * (stats.finite / (stats.finite - 1)) ** 0.5)


def _statistics(tensor: torch.Tensor) -> Statistics | None:
    try:
        return statistics(tensor)
    except NotSupported:  # bits and other dtypes that are no numbers
        return None


def _metadata(old: OldName, record: TensorRecord, tensor: torch.Tensor) -> dict[str, Any]:
    words = {
        "layer_type": old.layer_type,
        "operation": old.operation,
        "quant_type": old.quant_type,
        "tensor_name": old.tensor,
        "layer_idx": old.layer,
        "save_time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    fields = encode_record(replace(record, payload=None))
    ours = {"tensortap": VERSION, "crc32": _checksum(tensor, fields)}
    return words | ours | fields


def _checksum(tensor: torch.Tensor, fields: Mapping[str, Any]) -> int:
    """Of the values and the record; keys that somebody adds to the metadata do not count."""
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode(), zlib.crc32(bytes_of(tensor)))


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """One file: its tensor, and where tensortap wrote it the record and what it is made from."""

    tensor: torch.Tensor
    record: TensorRecord | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_file(path: Path) -> Saved:
    """One file, its tensor mapped: nothing of the values is read yet.

    Raises `RunError` naming the file when it cannot be served. Code in a file is never run.
    """
    if not path.is_file():
        raise RunError(f"{path} is not a regular file.")
    try:
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
        fields = content if isinstance(content, dict) else {"tensor": content}
        tensor, metadata = fields.get("tensor"), fields.get("metadata")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError("it holds no tensor, alone or as the entry 'tensor'")
        if "tensor_info" in fields and not isinstance(metadata, dict):
            raise ValueError("its metadata is missing")
        if isinstance(metadata, dict) and ("tensortap" in metadata or "crc32" in metadata):
            return Saved(_plain(tensor), _record(metadata), metadata)
        return Saved(_plain(tensor))
    except Exception as failure:
        # Whatever a hostile or damaged file makes torch raise, it is this file that is wrong.
        raise _broken(path, failure) from failure


def _broken(path: Path, failure: Exception) -> RunError:
    reason = str(failure).partition("\n")[0].strip()[:200] or type(failure).__name__
    return RunError(
        f"{path} cannot be imported: {reason.rstrip('.')}. A file holds tensors and plain data; "
        "pickled code is never run."
    )


def _record(metadata: dict[str, Any]) -> TensorRecord:
    version = metadata.get("tensortap")
    if version != VERSION:
        raise ValueError(f"its metadata has version {version!r}, this reader knows {VERSION}")
    return decode_record(json.loads(json.dumps(metadata)))  # Tuples become the lists of a line.


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError(f"a {tensor.layout} tensor on {tensor.device} is not served")
    if dtype_name(tensor.dtype) not in STORED:
        raise ValueError(f"dtype {dtype_name(tensor.dtype)} is not served")
    return tensor.detach().resolve_conj().resolve_neg()


def load(path: Path, planned: TensorRecord) -> tuple[TensorRecord, torch.Tensor]:
    """The values of a file that was read before, contiguous, and its record with statistics.

    Raises `RunError` when the tensor is not the one its metadata describes.
    """
    saved = read_file(path)
    try:
        whole = saved.tensor.contiguous()
        if saved.record is None:
            return replace(planned, stats=_statistics(whole)), whole
        _check(saved.record, saved.metadata, whole)
    except (RuntimeError, ValueError) as failure:  # RuntimeError: more memory than there is
        raise _broken(path, failure) from failure
    return saved.record, whole


def _check(record: TensorRecord, metadata: Mapping[str, Any], tensor: torch.Tensor) -> None:
    found = dtype_name(tensor.dtype), tuple(tensor.shape)
    if found != (record.dtype, payload_shape(record)):
        raise ValueError(
            f"its tensor is {found[0]} {found[1]}, its metadata says {record.dtype} "
            f"{payload_shape(record)}"
        )
    fields = {key: metadata.get(key) for key in encode_record(record)}
    if _checksum(tensor, fields) != metadata.get("crc32"):
        raise ValueError("it is damaged or was changed: its checksum differs")


def bare_record(path: Path, old: OldName, tensor: torch.Tensor, rank: int) -> TensorRecord:
    """What the name of a file tells of its tensor; `seq` and `call` come from its place."""
    return TensorRecord(
        name=canonical(old),
        native=path.stem,
        at=Coordinates(step=old.step, microbatch=old.microbatch, rank=rank),
        shape=tuple(tensor.shape),
        dtype=dtype_name(tensor.dtype),
        device="cpu",
        seq=0,
        values="full",
    )
