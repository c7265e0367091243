"""What is wrong with a run as a whole: ranks that are missing or contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tensortap.errors import ConfigError
from tensortap.records import RunInfo
from tensortap.selection import Indices

_MOST_RANKS = 1 << 17  # a world size comes from a file; nobody counts to 10**9 here


def run_problems(path: Path, info: RunInfo, ranks: Mapping[int, RunInfo | None]) -> Iterator[str]:
    """Problems, as sentences. Ranks that were not selected for capture are not missed."""
    if info.world_size > _MOST_RANKS:
        yield f"{path}: a world size of {info.world_size} cannot be right"
        return
    wanted = _captured_ranks(info)
    missing = [rank for rank in range(info.world_size) if rank in wanted and rank not in ranks]
    if missing:
        listed = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        yield f"{path}: {len(missing)} of {info.world_size} ranks are missing: {listed}"
    for rank, own in ranks.items():
        if own is not None and own.launch_id != info.launch_id:
            yield f"{path}: rank {rank} is of another launch ({own.launch_id})"


def _captured_ranks(info: RunInfo) -> Indices:
    text = info.settings.get("ranks")
    try:
        return Indices.parse(text if isinstance(text, str) and len(text) < 256 else None, "ranks")
    except ConfigError:
        return Indices.parse(None, "ranks")
