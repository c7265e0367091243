"""`TensorRecord` as the fields of a JSON line, and back from a line nobody vouches for.

Fields at their default are left out. Encoding runs once per captured tensor beside a training
step, so it is plain code; decoding checks every value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tensortap.errors import ConfigError
from tensortap.names import TensorName, interned
from tensortap.records import (
    Coordinates,
    FormatInfo,
    Part,
    PayloadRef,
    Placement,
    Segment,
    Statistics,
    TensorRecord,
    encode_float,
)
from tensortap.store.dtypes import STORED
from tensortap.store.fields import (
    array,
    flag,
    integer,
    mapping,
    number,
    optional_text,
    text,
    whole,
)
from tensortap.store.layout import is_shard

MAX_U32 = (1 << 32) - 1
_MAX_DIMS = 64
_NUMBER = re.compile(r"-?[0-9]{1,6}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_COUNTS = ("count", "nan", "posinf", "neginf", "zero")
_FLOATS = ("min", "max", "absmax", "mean", "std", "rms", "l1", "l2")


def encode_record(record: TensorRecord) -> dict[str, Any]:
    """The record as JSON fields; hot: once per captured tensor."""
    at = record.at
    fields: dict[str, Any] = {
        "seq": record.seq, "name": str(record.name), "native": record.native,
        "step": at.step, "microbatch": at.microbatch, "call": at.call, "rank": at.rank,
        "shape": record.shape, "dtype": record.dtype, "device": record.device,
        "values": record.values,
    }  # fmt: skip
    if at.recompute:
        fields["recompute"] = True
    if at.eval:
        fields["eval"] = True
    if record.stride != 1:
        fields["stride"] = record.stride
    if record.dims is not None:
        fields["dims"] = record.dims
    if record.placement is not None:
        fields["placement"] = _encode_placement(record.placement)
    if record.stats is not None:
        fields["stats"] = _encode_statistics(record.stats)
    if record.payload is not None:
        ref = record.payload
        fields["payload"] = [ref.shard, ref.offset, ref.nbytes, ref.digest]
    if record.format is not None:
        kind = record.format
        fields["format"] = {"name": kind.name, "block": kind.block, "rounding": kind.rounding}
    return fields


def _encode_statistics(stats: Statistics) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "count": stats.count, "nan": stats.nan, "posinf": stats.posinf, "neginf": stats.neginf,
        "zero": stats.zero, "min": encode_float(stats.min), "max": encode_float(stats.max),
        "absmax": encode_float(stats.absmax), "mean": encode_float(stats.mean),
        "std": encode_float(stats.std), "rms": encode_float(stats.rms),
        "l1": encode_float(stats.l1), "l2": encode_float(stats.l2),
        "first": [encode_float(value) for value in stats.first],
    }  # fmt: skip
    if stats.exponents is not None:
        fields["exponents"] = {str(key): count for key, count in stats.exponents.items()}
    return fields


def _encode_placement(placement: Placement) -> dict[str, Any]:
    if placement.unknown:
        return {"unknown": True}
    fields: dict[str, Any] = {"logical_shape": placement.logical_shape}
    if placement.segments:
        fields["segments"] = {str(axis): runs for axis, runs in placement.segments.items()}
    if placement.valid:
        fields["valid"] = {str(axis): length for axis, length in placement.valid.items()}
    if placement.partial:
        fields["partial"] = placement.partial
    if placement.parts:
        fields["parts"] = [[part.module, part.axis, part.segments] for part in placement.parts]
    return fields


def decode_record(fields: Mapping[str, Any]) -> TensorRecord:
    """Inverse of `encode_record`; raises `ValueError` saying which field is wrong."""
    values = fields.get("values")
    if values not in ("stats", "full", "sample"):
        raise ValueError(f"values must be stats, full or sample, not {values!r:.80}")
    record = TensorRecord(
        name=decode_name(text(fields, "name")),
        native=text(fields, "native"),
        at=_decode_coordinates(fields),
        shape=_sizes(array(fields, "shape"), "shape"),
        dtype=text(fields, "dtype"),
        device=text(fields, "device"),
        seq=integer(fields, "seq"),
        values=values,
        stride=integer(fields, "stride", 1),
        dims=optional_text(fields, "dims"),
        placement=_decode_placement(fields) if "placement" in fields else None,
        stats=_decode_statistics(fields) if "stats" in fields else None,
        payload=_decode_payload(fields) if "payload" in fields else None,
        format=_decode_format(fields) if "format" in fields else None,
    )
    check_payload(record)
    return record


def payload_shape(record: TensorRecord) -> tuple[int, ...]:
    """The shape of what is stored: the tensor's own, or one axis of samples."""
    if record.values == "full":
        return record.shape
    return (-(-math.prod(record.shape) // max(record.stride, 1)),)


def check_payload(record: TensorRecord) -> None:
    """Raise `ValueError` when values, stride, shape, dtype and payload contradict each other."""
    if record.stride < 1 or (record.stride > 1 and record.values != "sample"):
        raise ValueError(f"stride {record.stride} does not go with values={record.values}")
    if record.payload is None:
        return
    if record.values == "stats":
        raise ValueError("statistics only, and yet a payload")
    stored = STORED.get(record.dtype)
    size = math.prod(payload_shape(record))
    if stored is not None and record.payload.nbytes != size * stored.itemsize:
        raise ValueError(
            f"{size} elements of {record.dtype} do not take {record.payload.nbytes} bytes"
        )


def decode_name(name: str) -> TensorName:
    """A name from a file; raises `ValueError` (names are data: this is all they are used for)."""
    try:
        return interned(*name.split("/"))
    except (ConfigError, TypeError) as failure:
        raise ValueError(f"{name[:80]!r} is not a tensor name") from failure


def _decode_coordinates(fields: Mapping[str, Any]) -> Coordinates:
    return Coordinates(
        step=integer(fields, "step"),
        microbatch=integer(fields, "microbatch", 0, top=MAX_U32),
        call=integer(fields, "call", 0, top=MAX_U32),
        rank=integer(fields, "rank", 0, top=MAX_U32),
        recompute=flag(fields, "recompute"),
        eval=flag(fields, "eval"),
    )


def _decode_statistics(record: Mapping[str, Any]) -> Statistics:
    fields = mapping(record, "stats")
    count, nan, posinf, neginf, zero = (integer(fields, key) for key in _COUNTS)
    floats = (number(fields.get(key), key) for key in _FLOATS)
    low, high, absmax, mean, std, rms, l1, l2 = floats
    return Statistics(
        count, nan, posinf, neginf, zero, low, high, absmax, mean, std, rms, l1, l2,
        first=tuple([_definite(value) for value in array(fields, "first")]),
        exponents=_decode_exponents(fields),
    )  # fmt: skip


def _definite(value: Any) -> float:
    found = number(value, "first")
    if found is None:
        raise ValueError("first must hold numbers")
    return found


def _decode_exponents(fields: Mapping[str, Any]) -> dict[int, int] | None:
    if "exponents" not in fields:
        return None
    found = mapping(fields, "exponents")
    return {_axis(key, "exponent"): whole(count, "exponents") for key, count in found.items()}


def _decode_payload(record: Mapping[str, Any]) -> PayloadRef:
    fields = array(record, "payload")
    if len(fields) != 4:
        raise ValueError("payload must be shard, offset, bytes and digest")
    shard, offset, nbytes, digest = fields
    if not isinstance(shard, str) or not is_shard(shard):
        raise ValueError(f"{shard!r:.80} is not the name of a shard")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("payload digest must be 32 hexadecimal digits")
    return PayloadRef(shard, whole(offset, "offset"), whole(nbytes, "nbytes"), digest)


def _decode_format(record: Mapping[str, Any]) -> FormatInfo:
    fields = mapping(record, "format")
    block = None if fields.get("block") is None else integer(fields, "block")
    return FormatInfo(text(fields, "name"), block, optional_text(fields, "rounding"))


def _decode_placement(record: Mapping[str, Any]) -> Placement:
    fields = mapping(record, "placement")
    if flag(fields, "unknown"):
        return Placement(unknown=True)
    partial = array(fields, "partial")
    if not all(isinstance(group, str) for group in partial):
        raise ValueError("partial must name groups")
    return Placement(
        logical_shape=_sizes(array(fields, "logical_shape"), "logical_shape"),
        segments={
            _axis(key, "axis"): _segments(runs) for key, runs in mapping(fields, "segments").items()
        },
        valid={
            _axis(key, "axis"): whole(length, "valid")
            for key, length in mapping(fields, "valid").items()
        },
        partial=tuple(partial),
        parts=tuple(_decode_part(part) for part in array(fields, "parts")),
    )


def _decode_part(fields: Any) -> Part:
    if not isinstance(fields, list) or len(fields) != 3 or not isinstance(fields[0], str):
        raise ValueError("a part must be module, axis and segments")
    if type(fields[1]) is not int or abs(fields[1]) > _MAX_DIMS:
        raise ValueError("the axis of a part must be a small number")
    return Part(fields[0], fields[1], _segments(fields[2]))


def _segments(runs: Any) -> tuple[Segment, ...]:
    if not isinstance(runs, list):
        raise ValueError("segments must be a list")
    return tuple(_segment(run) for run in runs)


def _segment(run: Any) -> Segment:
    if not isinstance(run, list) or len(run) != 2:
        raise ValueError("a segment must be start and length")
    return whole(run[0], "start"), whole(run[1], "length")


def _sizes(sizes: list[Any], key: str) -> tuple[int, ...]:
    if len(sizes) > _MAX_DIMS:
        raise ValueError(f"{key} has {len(sizes)} axes")
    return tuple([whole(size, key) for size in sizes])


def _axis(key: str, what: str) -> int:
    if not _NUMBER.fullmatch(key):
        raise ValueError(f"{key[:20]!r} is not an {what}")
    return int(key)
