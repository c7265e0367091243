"""The JSON documents of a run (run.json, rank.json, coverage.json): readable, with a checksum."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from tensortap.errors import RunCorrupt
from tensortap.records import RunInfo
from tensortap.store.fields import integer, mapping, optional_text, text, whole
from tensortap.store.layout import SCHEMA, read_small
from tensortap.store.lines import parse_object

_MAX_DEPTH = 32


def encode_document(content: Mapping[str, Any]) -> bytes:
    """Indented JSON with the checksum of its content; values JSON lacks become strings."""
    body = {"schema": SCHEMA, **plain(content)}
    return (json.dumps({"checksum": _checksum(body), **body}, indent=2) + "\n").encode()


def read_document(path: Path) -> dict[str, Any]:
    """Read and check a document.

    Raises `FileNotFoundError` when it is absent, `RunCorrupt` when it is damaged or of a schema
    this version does not know.
    """
    try:
        body = parse_object(read_small(path))
        checksum = body.pop("checksum", None)
        if checksum != _checksum(body):
            raise ValueError("checksum mismatch: it was damaged or edited")
        schema = integer(body, "schema")
    except (ValueError, RecursionError) as failure:
        raise RunCorrupt(f"{path}: {failure}.") from failure
    del body["schema"]
    if schema != SCHEMA:
        raise RunCorrupt(f"{path} has schema {schema}; this version reads {SCHEMA}. Upgrade.")
    return body


def _checksum(body: Mapping[str, Any]) -> str:
    return xxh3_64_hexdigest(json.dumps(body, separators=(",", ":"), sort_keys=True).encode())


def plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON can hold it: NaN and infinity, and all foreign objects, become strings."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if depth < _MAX_DEPTH and isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if depth < _MAX_DEPTH and isinstance(value, (Sequence, set, frozenset)):
        return [plain(item, depth + 1) for item in value]
    return str(value)


def encode_info(info: RunInfo) -> dict[str, Any]:
    """`RunInfo` as JSON fields."""
    return {field.name: plain(getattr(info, field.name)) for field in fields_of(info)}


def decode_info(content: Mapping[str, Any], where: Path) -> RunInfo:
    """`RunInfo` from a document; raises `RunCorrupt` naming the file and the field."""
    try:
        return RunInfo(
            launch_id=text(content, "launch_id"),
            created=text(content, "created"),
            rank=integer(content, "rank", 0, top=10**9),
            world_size=integer(content, "world_size", 1, top=10**9),
            model_class=text(content, "model_class"),
            model_config=mapping(content, "model_config"),
            mode=optional_text(content, "mode"),
            format=optional_text(content, "format"),
            parallel={key: whole(size, key) for key, size in mapping(content, "parallel").items()},
            versions={key: str(word) for key, word in mapping(content, "versions").items()},
            settings=mapping(content, "settings"),
            metadata=mapping(content, "metadata"),
        )
    except ValueError as failure:
        raise RunCorrupt(f"{where}: {failure}.") from failure
