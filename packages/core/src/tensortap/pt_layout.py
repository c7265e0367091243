"""The layout `pt`: one file a tensor, readable with `torch.load(weights_only=True)`."""

from __future__ import annotations

import json
import re
import uuid
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tensortap.coverage import Coverage
from tensortap.errors import RunError
from tensortap.layouts import Moved, Progress, filling, new_folder, sinks_of_ranks
from tensortap.records import RunInfo, TensorRecord
from tensortap.sinks import CoverageSink, TensorSink
from tensortap.store import Run
from tensortap.store.codec import decode_record, encode_record, payload_shape
from tensortap.store.documents import decode_info, encode_document, encode_info, read_document
from tensortap.store.dtypes import dtype_name


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
        """See `Layout.load`; files that cannot be read are skipped, unless there are no others."""
        files = sorted(folder.glob("*.pt"))
        if not files:
            raise RunError(f"{folder} holds no .pt files; is it a folder of the layout 'pt'?")
        broken: dict[Path, str] = {}
        good = [path for path in files if _is_good(path, broken)]
        if not good:
            path, why = next(iter(broken.items()))
            raise RunError(f"{path} {why}.")
        infos = _run_infos(folder, good)
        done, left = 0, dict(broken)
        for target, ranks in sinks_of_ranks(sink, infos):
            some = [path for path in good if _rank_of(path) in ranks]
            done = _fill(target, infos[ranks[0]], some, left, progress, done)
            left = {}  # Said once, with the first rank.
        return Moved(done, done, tuple(f"{path.name}: {why}" for path, why in broken.items()))


def _is_good(path: Path, broken: dict[Path, str]) -> bool:
    """Can it be read? Else why not is in `broken`."""
    try:
        _rank_of(path)
        _read(path)
    except RunError as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{path} ")
        broken[path] = reason.rstrip(".")
        return False
    return True


def _fill(
    sink: TensorSink,
    info: RunInfo,
    files: Iterable[Path],
    broken: Mapping[Path, str],
    progress: Progress,
    done: int,
) -> int:
    """Read files into one sink; returns how many there are now."""
    coverage, steps = Coverage(), set()
    for path, why in broken.items():
        coverage.gap(path.name, why)
    with filling(sink, info):
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
    """One file, its tensor mapped; what is wrong with it is a `RunError` that names it.

    Runs no code from it.
    """
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
        fields = json.loads(json.dumps(content["record"]))  # Tuples become the lists of a line.
        record, tensor = decode_record(fields), content["tensor"].contiguous()
        _require_match(path, record, tensor)
    except Exception as error:
        raise RunError(f"{path} is not a tensor file of the layout 'pt': {error}") from error
    return record, tensor


def _require_match(path: Path, record: TensorRecord, tensor: torch.Tensor) -> None:
    """Raise `ValueError` where the record is that of another tensor, or of another rank."""
    found, said = (dtype_name(tensor.dtype), tuple(tensor.shape)), payload_shape(record)
    if found != (record.dtype, said):
        raise ValueError(f"its tensor is {found[0]} {found[1]}, its record {record.dtype} {said}")
    if record.at.rank != _rank_of(path):
        raise ValueError(f"its record is of rank {record.at.rank}")
