"""The layout `pt`: one file a tensor, readable with `torch.load(weights_only=True)`."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from tensortap.coverage import Coverage
from tensortap.errors import RunError
from tensortap.layouts import Moved, Progress, new_folder, sinks_of_ranks
from tensortap.records import RunInfo, TensorRecord
from tensortap.sinks import CoverageSink, TensorSink
from tensortap.store import Run
from tensortap.store.codec import decode_record, encode_record
from tensortap.store.documents import decode_info, encode_document, encode_info, read_document


class PtLayout:
    """`pt`: one dictionary `{"tensor": …, "record": …}` a file, and `run.json` beside them.

    Files are named `<rank>_<seq>_<name>.pt` with dots for slashes; what counts on import is the
    record inside, whose fields are those of a line of `records.jsonl`. Ranks other than 0 have a
    `run.00001.json` each.
    """

    name = "pt"

    def export(self, run: Run, out: Path, select: str, progress: Progress) -> Moved:
        """See `Layout.export`; records without values are skipped, and counted."""
        records = run.records(select)
        new_folder(out)
        for rank in run.ranks:
            (out / _info_name(rank)).write_bytes(encode_document(encode_info(run.info_of(rank))))
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
        infos = _run_infos(folder, files)
        done = 0
        for target, ranks in sinks_of_ranks(sink, infos):
            some = [path for path in files if _rank_of(path) in ranks]
            done = _fill(target, infos[ranks[0]], some, progress, done)
        return Moved(len(files), len(files))


def _fill(
    sink: TensorSink, info: RunInfo, files: Iterable[Path], progress: Progress, done: int
) -> int:
    """Read files into one sink; returns how many there are now."""
    coverage, steps = Coverage(), set()
    sink.open(info)
    try:
        for path in files:
            record, tensor = _read(path)
            sink.write(record, tensor)
            coverage.captured(str(record.name))
            steps.add(record.at.step)
            progress(done := done + 1)
        for step in sorted(steps):
            sink.end_step(step)
        if isinstance(sink, CoverageSink):
            sink.cover(coverage.report(steps=len(steps)))
    finally:
        sink.close()
    return done


def _file_name(record: TensorRecord) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]", ".", str(record.name))[:180]
    return f"{record.at.rank:05d}_{record.seq:08d}_{safe}.pt"


def _info_name(rank: int) -> str:
    return "run.json" if rank == 0 else f"run.{rank:05d}.json"


def _run_infos(folder: Path, files: Iterable[Path]) -> dict[int, RunInfo]:
    """What each rank said of itself, as one launch; the names of the files begin with the rank."""
    launch = f"import-{uuid.uuid4().hex[:12]}"
    ranks = sorted({_rank_of(path) for path in files})
    found = {}
    for rank in ranks:
        path = folder / _info_name(rank)
        info = RunInfo(launch_id=launch, created="", world_size=max(ranks) + 1)
        if path.exists():
            info = decode_info(read_document(path), path)
        found[rank] = replace(info, launch_id=launch, rank=rank)
    return found


def _rank_of(path: Path) -> int:
    number = path.name.partition("_")[0]
    if not number.isdecimal():
        raise RunError(f"{path} is not named <rank>_<seq>_<name>.pt; the layout 'pt' names it so.")
    return int(number)


def _read(path: Path) -> tuple[TensorRecord, torch.Tensor]:
    """One file; anything wrong with it is a `RunError` that names it. Runs no code from it."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        fields = json.loads(json.dumps(content["record"]))  # Tuples become the lists of a line.
        record, tensor = decode_record(fields), content["tensor"].contiguous()
    except Exception as error:
        raise RunError(f"{path} is not a tensor file of the layout 'pt': {error}") from error
    return record, tensor
