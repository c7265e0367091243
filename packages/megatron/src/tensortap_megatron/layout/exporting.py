"""A run as the files of the old fork."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensortap.errors import RunError
from tensortap.layouts import Moved, Progress, new_folder
from tensortap.records import RunInfo
from tensortap.store import Run
from tensortap_megatron.layout.folder import RankFolder
from tensortap_megatron.layout.sink import BARE, bare_gaps

_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)")
_NOTHING_MORE = {"complete": True, "gaps": [], "notes": []}


def export(run: Run, out: Path, select: str, progress: Progress) -> Moved:
    """Write the selected records of `run`, each rank into its folder.

    The counter follows the order of execution. Every file carries the time at which the run was
    made, since records have none of their own. What cannot be written is in `Moved.skipped`, and
    a gap in the coverage that an import will find.
    """
    records = run.records(select)
    new_folder(out)
    timestamp = _timestamp(run.info)
    folders = {rank: RankFolder(out, _info_of(run, rank)) for rank in run.ranks}
    bare: Counter[str] = Counter()
    for count, record in enumerate(records, start=1):
        if record.values == "stats":
            bare[str(record.name)] += 1
        else:
            folders[record.at.rank].write(record, run.piece(record), timestamp)
        progress(count)
    skipped = [f"{run.path}: exported as far as it goes, but {p}" for p in run.problems]
    skipped += [f"{name}: {BARE}" for name in bare.elements()]
    for rank, folder in folders.items():
        folder.cover(_coverage(run, bare) if rank == min(folders) else _NOTHING_MORE)
    files = sum(folder.files for folder in folders.values())
    return Moved(files, files, tuple(skipped))


def _info_of(run: Run, rank: int) -> RunInfo:
    """What the rank said of itself; where that is lost, its place among the ranks is not known."""
    info = run.info_of(rank)
    return info if info.rank == rank else replace(info, rank=rank, parallel={})


def _timestamp(info: RunInfo) -> str:
    found = _DATE.match(info.created)
    if found is None:
        return time.strftime("%Y%m%d_%H%M%S")
    digits = "".join(found.groups())
    return f"{digits[:8]}_{digits[8:]}"


def _coverage(run: Run, bare: Counter[str]) -> dict[str, Any]:
    """The gaps and notes of the run, and what was not exported; counts come with an import."""
    try:
        report = run.coverage()
    except RunError:  # A damaged report: `problems` names it.
        report = {}
    lost = [{"name": "*", "reason": problem, "count": 1} for problem in run.problems]
    gaps = [*report.get("gaps", ()), *lost, *bare_gaps(bare)]
    return {"complete": not gaps, "gaps": gaps, "notes": report.get("notes", [])}
