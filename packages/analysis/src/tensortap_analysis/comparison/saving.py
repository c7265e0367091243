"""Comparisons as files: everything that was measured, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tensortap.errors import ConfigError, RunError
from tensortap.store.disk import replace_file
from tensortap_analysis.captured.facts import RunFacts
from tensortap_analysis.comparison.outcome import RunComparison
from tensortap_analysis.measuring.layers import Change
from tensortap_analysis.outputs import require_writable
from tensortap_analysis.pairs.pair import Pair
from tensortap_analysis.pairs.pairing import Unpaired

_KIND, _SCHEMA = "tensortap-comparison", 1
_T = TypeVar("_T")


def save(document: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a document whole, or not at all; raises `ConfigError`."""
    require_writable(Path(path), "")
    try:
        replace_file(Path(path), json.dumps(document, allow_nan=False).encode(), sync=False)
    except OSError as failure:
        raise ConfigError(f"{path} cannot be written: {failure.strerror}.") from failure


def load(path: str | os.PathLike[str], read: Callable[[Mapping[str, Any]], _T]) -> _T:
    """Read a document by `read`; raises `RunError` for anything but a saved comparison."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"There is no saved comparison at {path}.") from None
    except OSError as failure:
        raise RunError(f"{path} is no saved comparison: {failure.strerror}.") from failure
    except ValueError as failure:
        raise RunError(f"{path} is no saved comparison: it is not JSON.") from failure
    _require_kind(document, path)
    try:
        return read(document)
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        reason = f"{type(failure).__name__} {failure}"
        raise RunError(f"{path} is no whole saved comparison ({reason}).") from failure


def _require_kind(document: object, path: str | os.PathLike[str]) -> None:
    fields = document if isinstance(document, dict) else {}
    if fields.get("kind") == _KIND and fields.get("schema") == _SCHEMA:
        return
    if fields.get("kind") == _KIND:
        raise RunError(
            f"{path} is no saved comparison that this version reads: its schema is "
            f"{fields.get('schema')}, not {_SCHEMA}."
        )
    what = "no saved comparison"
    if {"verdict", "summary"} <= fields.keys():
        what += ", but what --json prints; --save FILE keeps what can be judged again"
    raise RunError(f"{path} is {what}.")


def encoded(ref: RunFacts, runs: Sequence[RunComparison], noise: RunFacts | None) -> dict[str, Any]:
    """What was measured, as plain JSON."""
    return {
        "kind": _KIND,
        "schema": _SCHEMA,
        "ref": ref.to_json(),
        "noise": None if noise is None else noise.to_json(),
        "runs": [
            {
                "run": run.run.to_json(),
                "pairs": [pair.to_json() for pair in run.pairs],
                "beside": [pair.to_json() for pair in run.beside],
                "unpaired": [asdict(one) for one in run.unpaired],
                "changes": [change.to_json() for change in run.changes],
            }
            for run in runs
        ],
    }


def decoded(
    document: Mapping[str, Any],
) -> tuple[RunFacts, tuple[RunComparison, ...], RunFacts | None]:
    """Inverse of `encoded`: reference, runs, and the noise run."""
    runs = tuple(
        RunComparison(
            RunFacts.from_json(run["run"]),
            tuple(Pair.from_json(pair) for pair in run["pairs"]),
            tuple(Unpaired(**one) for one in run["unpaired"]),
            tuple(Change.from_json(change) for change in run["changes"]),
            beside=tuple(Pair.from_json(pair) for pair in run.get("beside", ())),
        )
        for run in document["runs"]
    )
    noise = document["noise"]
    about = None if noise is None else RunFacts.from_json(noise)
    return RunFacts.from_json(document["ref"]), runs, about
