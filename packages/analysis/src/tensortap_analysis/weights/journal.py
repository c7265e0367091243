"""A journal beside the report: what an interrupted scan has measured already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from tensortap_analysis import __version__
from tensortap_analysis.weights.options import Options
from tensortap_analysis.weights.saved import checked, encoded
from tensortap_analysis.weights.sources.source import Source

_KIND, _SCHEMA = "tensortap-scan-journal", 1


class Journal:
    """Appends a line for each weight measured; a line that was cut off counts as not written.

    It is of use for the same files, methods, options and versions only: with others it begins
    afresh. `done` is what an earlier scan has left, by the weight's name.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self._key = key
        self.done: dict[str, dict[str, Any]] = dict(_lines(path, key))
        self._file: IO[str] | None = None

    def __enter__(self) -> Journal:
        fresh = not self.done
        self._file = self.path.open("w" if fresh else "a", encoding="utf-8")
        if fresh:
            self._write({"kind": _KIND, "schema": _SCHEMA, "key": self._key})
        else:
            self._file.write("\n")  # The line before may have been cut off.
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, name: str, measured: Mapping[str, Any]) -> None:
        """Keep what was measured of one weight; on disk when this returns, short of a crash."""
        self._write({"name": name, **encoded(dict(measured))})

    def discard(self) -> None:
        """Remove the file: the report is written."""
        self.path.unlink(missing_ok=True)

    def _write(self, content: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(content, allow_nan=False) + "\n")
        self._file.flush()


def kept(output: Path) -> str:
    """What an interrupted scan that was to be saved as `output` has left, in a sentence."""
    path = Path(f"{output}.journal")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    count = sum("name" in content for line in lines if (content := _parsed(line)))
    if not count:
        return "no weight was finished yet."
    weights = "1 weight is" if count == 1 else f"{count:,} weights are"
    return f"{weights} kept in {path}; the same command goes on from there."


def key_of(source: Source, methods: tuple[str, ...], options: Options) -> str:
    """Differs where a measurement could: in files, methods, options, or who measures."""
    facts = [source.identity, methods, asdict(options), __version__, torch.__version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _lines(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a journal of this key holds; nothing where there is none."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        head = _parsed(file.readline())
        if head is None or (head.get("kind"), head.get("schema")) != (_KIND, _SCHEMA):
            return
        if head.get("key") != key:
            return
        for line in file:
            content = _parsed(line)
            if content is not None and (found := _measured(content)) is not None:
                yield content["name"], found


def _measured(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was measured of a weight; `None` for a line that a scan does not write."""
    name, digest, stats = (content.get(key) for key in ("name", "digest", "stats"))
    if not isinstance(name, str) or not isinstance(digest, str) or not isinstance(stats, dict):
        return None
    try:
        return {"digest": digest, "stats": checked(stats, name)}
    except (ValueError, AttributeError):
        return None


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
