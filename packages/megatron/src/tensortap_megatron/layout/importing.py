"""The files of the old fork, or of an export, as a run.

Files that tensortap wrote say all there is to know. Of any other file (a bare tensor, or the
fork's own dictionary) the name is all that counts: see `words.canonical`. Such files follow each
other by timestamp and counter, and `call` numbers those of one name in that order. A backward
file is therefore not paired with its forward: which of a layer's linears it belongs to, and to
which microbatch, the name does not say.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from tensortap.coverage import Coverage
from tensortap.errors import RunError
from tensortap.layouts import Moved, Progress, filling, sinks_of_ranks
from tensortap.records import RunInfo, TensorRecord
from tensortap.sinks import CoverageSink, TensorSink
from tensortap.store.documents import decode_info, read_document
from tensortap.store.reports import merge_coverage
from tensortap_megatron.layout.files import bare_record, load, read_file
from tensortap_megatron.layout.folder import COVERAGE, RUN, rank_folders
from tensortap_megatron.layout.words import OldName, parse

_UNPAIRED = (
    "from files without metadata: calls are numbered in the order of the files, and a backward is "
    "not paired with its forward"
)
_DIED = "the process ended before it wrote its coverage, so what is missing is not known"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, and the record it becomes; `old` where only the name of the file tells."""

    path: Path
    record: TensorRecord
    old: OldName | None = None


def load_folder(folder: Path, sink: TensorSink, progress: Progress) -> Moved:
    """Read `folder` into an unopened sink; files that cannot be read are skipped, and are gaps.

    Each rank of a run directory gets a sink of its own, as in a capture; any other sink is opened
    once and gets the records of all ranks. Raises `RunError` where no file can be read, or where
    what the folder says of its run is wrong.
    """
    broken: dict[Path, str] = {}
    entries = _scan(folder, broken)
    if not entries:
        raise _nothing(folder, broken)
    infos = _infos(folder, entries)
    told = _told(folder)
    done = 0
    shares = _shared_out(sink, infos, entries)
    for number, (target, info, some) in enumerate(shares, start=1):
        with filling(target, info):
            done = _fill(target, some, broken, progress, done)
            if not done and number == len(shares):
                raise _nothing(folder, broken)
            if isinstance(target, CoverageSink):
                target.cover(merge_coverage({Path(): _report(some, broken), **told}))
        told = {}  # Said once, with the first rank.
    return Moved(done, done, tuple(f"{path.name}: {why}" for path, why in broken.items()))


def _nothing(folder: Path, broken: Mapping[Path, str]) -> RunError:
    """Why nothing of a folder can be imported."""
    for path, why in broken.items():
        return RunError(f"{path} {why}.")
    deeper = sorted({path.parent.name for path in folder.glob("*/*.pt")})
    if deeper:
        hint = f"import its subfolders one by one: {', '.join(deeper[:5])}"
    else:
        hint = "is it a folder of the layout 'megatron-pt'?"
    return RunError(f"{folder} holds no .pt files; {hint}")


def _scan(folder: Path, broken: dict[Path, str]) -> list[Entry]:
    """Every file that can be read, in order; why not of the others is in `broken`."""
    if not folder.is_dir():
        raise RunError(f"There is no folder {folder}.")
    found = []
    for rank, where in rank_folders(folder).items():
        for path in sorted(where.glob("*.pt")):
            if not path.name.startswith("."):
                with _noting(path, broken):
                    found.append(_entry(path, rank))
    described = [entry for entry in found if entry.old is None]
    return described + _numbered([entry for entry in found if entry.old is not None], described)


@contextmanager
def _noting(path: Path, broken: dict[Path, str]) -> Iterator[None]:
    """What is wrong with one file is noted and goes no further."""
    try:
        yield
    except RunError as error:
        broken[path] = str(error).partition("\n")[0].removeprefix(f"{path} ").rstrip(".")


def _entry(path: Path, rank: int) -> Entry:
    saved = read_file(path)
    if saved.record is not None:
        return Entry(path, saved.record)
    old = parse(path.name)
    if old is None:
        raise RunError(
            f"{path} has no metadata of tensortap, and its name does not say what it is: "
            "timestamp_counter_layertype_operation_quanttype_tensor.pt is expected."
        )
    return Entry(path, bare_record(path, old, saved.tensor, old.rank or rank), old)


def _numbered(bare: Iterable[Entry], described: Iterable[Entry]) -> list[Entry]:
    """Give files that only have a name their order: after what is described, by time."""
    calls: Counter[tuple[object, ...]] = Counter()
    seq = 0
    for entry in described:
        key = _place(entry.record)
        calls[key] = max(calls[key], entry.record.at.call + 1)
        seq = max(seq, entry.record.seq + 1)
    numbered = []
    for order, entry in enumerate(sorted(bare, key=_moment), start=seq):
        at = replace(entry.record.at, call=calls[_place(entry.record)])
        calls[_place(entry.record)] += 1
        numbered.append(replace(entry, record=replace(entry.record, at=at, seq=order)))
    return numbered


def _place(record: TensorRecord) -> tuple[object, ...]:
    at = record.at
    return str(record.name), at.step, at.microbatch, at.rank


def _moment(entry: Entry) -> tuple[str, int, str]:
    old = entry.old
    return (old.timestamp, old.counter, str(entry.path)) if old else ("", 0, str(entry.path))


def _infos(folder: Path, entries: list[Entry]) -> dict[int, RunInfo]:
    """`RunInfo` of every rank, as run.json says, or as far as the files tell."""
    found: dict[int, RunInfo] = {}
    for where in rank_folders(folder).values():
        if (where / RUN).exists():
            info = decode_info(read_document(where / RUN), where / RUN)
            if info.rank in found:
                raise RunError(f"{where / RUN} says it is of rank {info.rank}, as another does.")
            found[info.rank] = info
    if len({info.launch_id for info in found.values()}) > 1:
        raise RunError(f"{folder} mixes the ranks of several runs; give each a folder of its own.")
    launch = f"import-{uuid.uuid4().hex[:12]}"
    known = next(iter(found.values()), _guess(entries))
    ranks = {entry.record.at.rank for entry in entries} - set(found)
    found |= {rank: replace(known, rank=rank, parallel={}) for rank in ranks}
    return {rank: replace(found[rank], launch_id=launch) for rank in sorted(found)}


def _guess(entries: list[Entry]) -> RunInfo:
    """What files without a run.json tell of their run."""
    names = sorted((entry.old for entry in entries if entry.old), key=lambda old: old.timestamp)
    kinds = Counter(old.quant_type for old in names)
    return RunInfo(
        launch_id="",
        created=_iso(names[0].timestamp) if names else "",
        world_size=max(entry.record.at.rank for entry in entries) + 1,
        format=next(iter(kinds)).replace("-", "_") if len(kinds) == 1 else None,
        metadata={"quant_types": dict(kinds)} if kinds else {},
    )


def _iso(timestamp: str) -> str:
    date, clock = timestamp.split("_")
    return f"{date[:4]}-{date[4:6]}-{date[6:]}T{clock[:2]}:{clock[2:4]}:{clock[4:]}"


def _told(folder: Path) -> dict[Path, Mapping[str, Any]]:
    """Gaps and notes that were written beside the tensors, or that nobody came to write them."""
    found: dict[Path, Mapping[str, Any]] = {}
    for where in rank_folders(folder).values():
        path = where / COVERAGE
        if path.exists():
            report = read_document(path)
            found[path] = {key: report.get(key, []) for key in ("gaps", "notes")}
        elif (where / RUN).exists():
            found[path] = {"gaps": [{"name": "*", "reason": _DIED, "count": 1}]}
    return {path: {"complete": not told["gaps"], **told} for path, told in found.items()}


def _shared_out(
    sink: TensorSink, infos: dict[int, RunInfo], entries: list[Entry]
) -> list[tuple[TensorSink, RunInfo, list[Entry]]]:
    """Which sink gets which records, in order of execution."""
    ordered = sorted(entries, key=lambda e: (e.record.at.step, e.record.seq, e.record.at.rank))
    return [
        (target, infos[ranks[0]], [entry for entry in ordered if entry.record.at.rank in ranks])
        for target, ranks in sinks_of_ranks(sink, infos)
    ]


def _fill(
    sink: TensorSink,
    entries: list[Entry],
    broken: dict[Path, str],
    progress: Progress,
    done: int,
) -> int:
    """Write the records into one open sink; returns how many there are now."""
    for step, some in groupby(entries, key=lambda entry: entry.record.at.step):
        for entry in some:
            with _noting(entry.path, broken):
                sink.write(*load(entry.path, entry.record))
                progress(done := done + 1)
        sink.end_step(step)
    return done


def _report(entries: list[Entry], broken: Mapping[Path, str]) -> Mapping[str, Any]:
    """What came into one sink, and what could not be read."""
    coverage = Coverage()
    for entry in entries:
        if entry.path not in broken:
            coverage.captured(str(entry.record.name))
            if entry.old is not None:
                coverage.note(entry.record.name.module, _UNPAIRED)
    for path, why in broken.items():
        coverage.gap(path.name, why)
    return coverage.report(steps=len({entry.record.at.step for entry in entries}))
