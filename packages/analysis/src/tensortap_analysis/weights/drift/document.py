"""A drift and its alerts as one JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tensortap.errors import ConfigError
from tensortap.store.disk import replace_file
from tensortap_analysis.weights.drift.notices import notices
from tensortap_analysis.weights.drift.tracking import Drift
from tensortap_analysis.weights.health import Issue
from tensortap_analysis.weights.saved import encoded

_KIND, _SCHEMA = "tensortap-drift", 1
_START = 200
"""Bytes in which the kind is named."""


def document(steps: Sequence[Drift], issues: Sequence[Sequence[Issue]]) -> dict[str, Any]:
    """`steps` with their `alerts`, those `overall`, and `notes`; `issues` are those of each step,
    and last those over all of them.
    """
    return {
        "kind": _KIND,
        "schema": _SCHEMA,
        "steps": [
            step.to_json() | {"alerts": [encoded(asdict(issue)) for issue in some]}
            for step, some in zip(steps, issues[:-1], strict=True)
        ],
        "overall": [encoded(asdict(issue)) for issue in issues[-1]],
        "notes": notices(steps),
    }


def save(path: Path, steps: Sequence[Drift], issues: Sequence[Sequence[Issue]]) -> None:
    """A file that is there is replaced once the new one is whole."""
    text = json.dumps(document(steps, issues), indent=1, allow_nan=False)
    replace_file(path, f"{text}\n".encode(), sync=False)


def check_replaced(path: Path) -> None:
    """Raise `ConfigError` where there is another file than one of `save`."""
    if not path.exists():
        return
    with path.open("rb") as file:
        start = file.read(_START)
    if f'"kind": "{_KIND}"'.encode() not in start:
        raise ConfigError(f"--output {path} exists and is no drift: save it elsewhere.")
