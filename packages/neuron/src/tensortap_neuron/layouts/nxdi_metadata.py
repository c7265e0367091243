"""`capture_metadata.json` of the layout `nxdi`: what NxDI's hook says, and what a user may add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tensortap.errors import RunError
from tensortap_neuron.layouts.files import cause, read_json
from tensortap_neuron.layouts.importing import Findings

METADATA = "capture_metadata.json"


@dataclass(frozen=True, slots=True)
class Told:
    """What the metadata says of the folder; `written` by NxDI's hook, or by nobody.

    `tensors` is by file name. Added by the user: `lengths`, the tokens of each row of each
    prompt, and `tp_degree`.
    """

    tensors: Mapping[str, Any]
    written: bool
    created: str = ""
    lengths: tuple[tuple[int, ...], ...] = ()
    tp_degree: int | None = None


def read_told(folder: Path, findings: Findings) -> Told:
    """Read it; where it is damaged that is a finding, and names of files have to do."""
    path = folder / METADATA
    if not path.exists():
        return Told({}, written=False)
    try:
        document = read_json(path)
        return Told(
            _mapping(document, "tensors"),
            True,
            _created(document),
            _lengths(document),
            _whole(document, "tp_degree"),
        )
    except RunError as failure:
        findings.skip("*", METADATA, cause(failure, path) + "; files are taken by their names")
        return Told({}, written=True)


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = document.get(key, {})
    if not isinstance(found, dict):
        raise RunError(f"{METADATA}: {key!r} must be an object.")
    return found


def _created(document: Mapping[str, Any]) -> str:
    seconds = _mapping(document, "capture_session").get("created_at")
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e11:
        return ""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def _lengths(document: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """`[5, 7]` are two rows of one prompt, `[[5], [7]]` two prompts of one row."""
    found = document.get("lengths", [])
    rows = found if isinstance(found, list) and found and _is_nested(found) else [found]
    good = all(isinstance(row, list) and all(type(n) is int and n > 0 for n in row) for row in rows)
    if not good:
        raise RunError(f"{METADATA}: 'lengths' must list the tokens of each row, not {found!r}.")
    return tuple(tuple(row) for row in rows if row)


def _is_nested(found: list[Any]) -> bool:
    return all(isinstance(row, list) for row in found)


def _whole(document: Mapping[str, Any], key: str) -> int | None:
    found = document.get(key)
    if found is not None and (type(found) is not int or found < 1):
        raise RunError(f"{METADATA}: {key!r} must be a number of at least 1, not {found!r}.")
    return found
