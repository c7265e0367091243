"""`Layout`: export a run to, or import it from, a foreign or older file layout.

Core holds the protocol and one plain layout, `pt`: one `torch.load(weights_only=True)` file a
tensor. Others come with the integration whose predecessor wrote them, as entry points of the
group `tensortap.layouts`.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import torch

from tensortap.coverage import Coverage
from tensortap.discovery import load_plugin
from tensortap.errors import ConfigError, RunError, RunExists, nearest
from tensortap.records import RunInfo, TensorRecord
from tensortap.sinks import CoverageSink, TensorSink
from tensortap.store import Run
from tensortap.store.codec import decode_record, encode_record
from tensortap.store.documents import decode_info, encode_document, encode_info, read_document

Progress = Callable[[int], None]
"""Called with the number of records done so far."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What an export or import did; `skipped` says why per record that could not go."""

    records: int
    files: int
    skipped: tuple[str, ...] = ()


class Layout(Protocol):
    """One foreign file layout; a subset of a run is exported by selecting names."""

    name: str

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """Write the selected records of `run` below the new folder `out`."""

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """Read `folder` into an unopened sink; opens and closes it."""


def layouts() -> dict[str, Layout]:
    """Every layout installed, by name; a broken plugin raises `PluginError`."""
    found: dict[str, Layout] = {"pt": PtLayout()}
    for entry in entry_points(group="tensortap.layouts"):
        found[entry.name] = load_plugin(entry)
    return found


def layout(name: str) -> Layout:
    """The layout called `name`; raises `ConfigError` listing the known ones."""
    known = layouts()
    if name not in known:
        raise ConfigError(f"There is no layout {name!r}; installed: {nearest(name, known)}.")
    return known[name]


def new_folder(path: Path) -> Path:
    """Make `path`; raises `RunExists` when something is there already."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not path.is_dir() or any(path.iterdir()):
            raise RunExists(f"{path} exists; choose another --out, or remove it.") from None
    except OSError as error:
        raise RunError(f"{path} cannot be made: {error.strerror}.") from error
    return path


class PtLayout:
    """`pt`: one dictionary `{"tensor": …, "record": …}` a file, and `run.json` beside them.

    Files are named `<rank>_<seq>_<name>.pt` with dots for slashes; what counts on import is the
    record inside, whose fields are those of a line of `records.jsonl`.
    """

    name = "pt"

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """See `Layout.export`; records without values are skipped, and counted."""
        records = run.records(select)
        new_folder(out)
        (out / "run.json").write_bytes(encode_document(encode_info(run.info)))
        skipped = [f"{run.path}: exported as far as it goes, but {p}" for p in run.problems]
        written = 0
        for count, record in enumerate(records, start=1):
            if record.values == "stats":
                skipped.append(f"{record.name}: statistics only; capture with values='full'")
            else:
                # A copy: torch.save would write the whole shard behind a mapped view.
                tensor = run.piece(record).clone()
                fields = encode_record(replace(record, payload=None))
                torch.save({"tensor": tensor, "record": fields}, out / _file_name(record))
                written += 1
            progress(count)
        return Moved(written, written, tuple(skipped))

    def load(self, folder: Path, sink: TensorSink, progress: Progress) -> Moved:
        """See `Layout.load`."""
        files = sorted(folder.glob("*.pt"))
        if not files:
            raise RunError(f"{folder} holds no .pt files; is it a folder of the layout 'pt'?")
        sink.open(_run_info(folder))
        coverage, steps = Coverage(), set()
        try:
            for count, path in enumerate(files, start=1):
                record, tensor = _read(path)
                sink.write(record, tensor)
                coverage.captured(str(record.name))
                steps.add(record.at.step)
                progress(count)
            for step in sorted(steps):
                sink.end_step(step)
            if isinstance(sink, CoverageSink):
                sink.cover(coverage.report(steps=len(steps)))
        finally:
            sink.close()
        return Moved(len(files), len(files))


def _file_name(record: TensorRecord) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]", ".", str(record.name))[:180]
    return f"{record.at.rank:05d}_{record.seq:08d}_{safe}.pt"


def _run_info(folder: Path) -> RunInfo:
    path = folder / "run.json"
    launch = f"import-{uuid.uuid4().hex[:12]}"
    if not path.exists():
        return RunInfo(launch_id=launch, created="")
    return replace(decode_info(read_document(path), path), launch_id=launch, rank=0)


def _read(path: Path) -> tuple[TensorRecord, torch.Tensor]:
    """One file; anything wrong with it is a `RunError` that names it. Runs no code from it."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        fields = json.loads(json.dumps(content["record"]))  # Tuples become the lists of a line.
        record, tensor = decode_record(fields), content["tensor"].contiguous()
    except Exception as error:
        raise RunError(f"{path} is not a tensor file of the layout 'pt': {error}") from error
    return record, tensor
