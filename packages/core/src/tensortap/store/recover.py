"""`recover`: finishes a run whose process died, and counts what is lost.

Nothing is cut off or thrown away: half a line stays where it is, and payload bytes that no
record refers to become `__lost` tensors of their shard.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensortap.errors import RunCorrupt, RunError
from tensortap.records import TensorRecord
from tensortap.store.disk import lock, replace_file, sync_directory
from tensortap.store.documents import encode_document, encode_info
from tensortap.store.finishing import Finished, finish_shard
from tensortap.store.index import save_index, stored_index_is_whole
from tensortap.store.layout import RANK, RECORDS, open_regular, require_run, shards_of
from tensortap.store.rank_reader import RankReader


@dataclass(frozen=True, slots=True)
class RankRecovery:
    """What was found and done in one rank's directory."""

    rank: int
    records: int
    finished_shards: int
    index_rebuilt: bool
    bad_lines: int
    lost_records: int
    lost_line_bytes: int
    lost_payload_bytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What `recover` found and did."""

    path: Path
    ranks: tuple[RankRecovery, ...]

    @property
    def lost(self) -> bool:
        """Is anything gone that had been captured?"""
        return any(
            rank.bad_lines
            or rank.lost_records
            or rank.lost_line_bytes
            or rank.lost_payload_bytes
            or rank.problems
            for rank in self.ranks
        )

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        ranks = [asdict(rank) | {"problems": list(rank.problems)} for rank in self.ranks]
        return {"run": str(self.path), "lost": self.lost, "ranks": ranks}

    def __str__(self) -> str:
        return "\n".join([f"{self.path}:", *(_sentence(rank) for rank in self.ranks)])


def _sentence(rank: RankRecovery) -> str:
    done = f"{rank.finished_shards} shards finished" + (", index rebuilt" * rank.index_rebuilt)
    lost = (
        f"lost: {rank.bad_lines} damaged lines, {rank.lost_records} records at the end, "
        f"{rank.lost_line_bytes} bytes of half a line, {rank.lost_payload_bytes} payload bytes"
    )
    lines = [f"  rank {rank.rank}: {rank.records} records read back; {done}; {lost}"]
    return "\n".join(lines + [f"    {problem}" for problem in rank.problems])


def recover(path: str | os.PathLike[str]) -> Recovery:
    """Finish the shards and the index of an interrupted run; a whole run is left as it is.

    Raises `RunError` for what is no run, or is still being written by a live process.
    """
    run = Path(path)
    with ExitStack() as locks:
        directories = require_run(run)
        for directory in directories.values():
            _take_over(directory, locks)
        return Recovery(run, tuple(_recover_rank(where, n) for n, where in directories.items()))


def _take_over(directory: Path, locks: ExitStack) -> None:
    """Hold the writer's lock for as long as files are changed."""
    try:
        descriptor = open_regular(directory / RECORDS)
    except (FileNotFoundError, RunCorrupt):
        return  # reported as a problem of the rank
    locks.callback(os.close, descriptor)
    if not _lock_patiently(descriptor):
        raise RunError(f"{directory} is still being written by a live process; left alone.")


def _lock_patiently(descriptor: int) -> bool:
    """Take the lock; a reader that asks whether it is held has it for an instant."""
    for _ in range(5):
        if lock(descriptor):
            return True
        time.sleep(0.02)
    return False


def _recover_rank(directory: Path, rank: int) -> RankRecovery:
    reader = RankReader(directory, rank, live=False)  # the lock is ours
    try:
        lost_records = reader.lost_records
        rebuild = not stored_index_is_whole(directory, reader.size)
        reader.rebuild()
        shards = _finish_shards(directory, reader)
        if rebuild and reader.size:
            save_index(directory, reader.index)
        recovery = RankRecovery(
            rank=rank,
            records=len(reader.index.rows) - reader.bad_lines,
            finished_shards=sum(shard.changed for shard in shards),
            index_rebuilt=rebuild,
            bad_lines=reader.bad_lines,
            lost_records=lost_records,
            lost_line_bytes=reader.size - reader.index.covered,
            lost_payload_bytes=sum(shard.lost for shard in shards),
            problems=tuple(p for shard in shards for p in shard.problems),
        )
        _mark(directory, reader, recovery)
    finally:
        reader.close()
    sync_directory(directory)
    return recovery


def _finish_shards(directory: Path, reader: RankReader) -> list[Finished]:
    held: dict[str, list[TensorRecord]] = {}
    for position in range(len(reader.index.rows)):
        record = reader.record(position)
        if record is not None and record.payload is not None:
            held.setdefault(record.payload.shard, []).append(record)
    names = shards_of(directory)
    finished = [_finish(directory / name, held.get(name, [])) for name in names]
    missing = sorted(held.keys() - set(names))
    gone = tuple(f"{directory / name} is missing" for name in missing)
    return [*finished, Finished(False, problems=gone)]


def _finish(path: Path, records: list[TensorRecord]) -> Finished:
    try:
        return finish_shard(path, records)
    except RunCorrupt as failure:
        return Finished(False, problems=(str(failure),))
    except OSError as failure:
        raise RunError(f"{path} could not be finished: {failure}.") from failure


def _mark(directory: Path, reader: RankReader, recovery: RankRecovery) -> None:
    """Let rank.json say that the run was interrupted, and what was lost."""
    if reader.state != "writing" or reader.info is None:
        return
    content = {
        "state": "recovered",
        "reason": "the run was interrupted before it was closed",
        "records": recovery.records + recovery.bad_lines + recovery.lost_records,
        "bytes": reader.size,
        "info": encode_info(reader.info),
    }
    replace_file(directory / RANK, encode_document(content), sync=True)
