"""Runs made of foreign files: what goes in, what could not, and why."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tensortap.coverage import Coverage
from tensortap.errors import NotSupported, RunError
from tensortap.layouts import Moved, Progress, filling, sinks_of_ranks
from tensortap.names import TensorName
from tensortap.records import Coordinates, Placement, RunInfo, Statistics, TensorRecord
from tensortap.sinks import CoverageSink, TensorSink
from tensortap.stats import statistics
from tensortap.store.dtypes import dtype_name
from tensortap_neuron.layouts.names import dims_of, place

NO_RANKS: Mapping[int, Mapping[str, int]] = MappingProxyType({})
"""There is one rank only."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A record to be: what it is called, when it was, and how to read its values.

    `read` may raise `RunError`; `source` is the file, as messages call it. `device` is where the
    values were, as far as the files tell.
    """

    name: TensorName
    native: str
    at: Coordinates
    read: Callable[[], torch.Tensor]
    source: str
    placement: Placement | None = None
    dims: str | None = None
    device: str = "cpu"


@dataclass(slots=True)
class Findings:
    """What a folder lacks. `skipped` are files that were not taken in: each is a gap as well."""

    gaps: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def skip(self, name: str, source: str, reason: str) -> None:
        """A file is not taken in; `name` is the tensor or module it would have been."""
        self.gaps.append((name, reason))
        self.skipped.append(f"{source}: {reason}")

    def require_some(self, found: Sequence[object], folder: Path, what: str) -> None:
        """Raise `RunError` where nothing could be taken in, with the first reason."""
        if not found:
            first = f" {self.skipped[0]}." if self.skipped else ""
            raise RunError(f"{folder} holds no {what}.{first}")


def new_info(created: str = "", **about: object) -> RunInfo:
    """A run that was imported; `about` goes into its metadata, without what is `None`."""
    return RunInfo(
        launch_id=f"import-{uuid.uuid4().hex[:12]}",
        created=created,
        metadata={key: value for key, value in about.items() if value is not None},
    )


def write(
    sink: TensorSink,
    info: RunInfo,
    pieces: Iterable[Piece],
    findings: Findings,
    progress: Progress,
    parallel: Mapping[int, Mapping[str, int]] = NO_RANKS,
) -> Moved:
    """Write the pieces into an unopened sink in execution order, each rank in its directory.

    `parallel` says of each rank its place among the others, where there are several.
    """
    ordered = sorted(pieces, key=_when)
    infos = _infos(info, sorted({piece.at.rank for piece in ordered}), parallel)
    files = {piece.source for piece in ordered}
    done = 0
    for target, ranks in sinks_of_ranks(sink, infos):
        some = [piece for piece in ordered if piece.at.rank in ranks]
        done = _fill(target, infos[ranks[0]], some, findings, progress, done)
    if not done:
        raise RunError(f"Nothing could be imported. {findings.skipped[0]}.")
    return Moved(done, len(files), tuple(findings.skipped))


def _when(piece: Piece) -> tuple[object, ...]:
    at = piece.at
    order = place(piece.name.module), not piece.name.tensor.startswith("input"), piece.name.tensor
    return at.step, at.microbatch, at.call, order, at.rank


def _infos(
    info: RunInfo, ranks: Sequence[int], parallel: Mapping[int, Mapping[str, int]]
) -> dict[int, RunInfo]:
    world = max(ranks, default=0) + 1
    return {
        rank: replace(info, rank=rank, world_size=world, parallel=parallel.get(rank, {}))
        for rank in ranks
    }


def _fill(
    sink: TensorSink,
    info: RunInfo,
    pieces: Sequence[Piece],
    findings: Findings,
    progress: Progress,
    done: int,
) -> int:
    """Write into one sink; returns how many there are now. Gaps are said with the first sink."""
    coverage, steps, seq = Coverage(), 0, 0
    with filling(sink, info):
        for step, some in groupby(pieces, key=lambda piece: piece.at.step):
            for piece in some:
                if _write_one(sink, piece, seq, findings):
                    coverage.captured(str(piece.name))
                    seq += 1
                    progress(done + seq)
            sink.end_step(step)
            steps += 1
        if isinstance(sink, CoverageSink):
            sink.cover(_report(coverage, findings, steps))
    return done + seq


def _write_one(sink: TensorSink, piece: Piece, seq: int, findings: Findings) -> bool:
    try:
        values = piece.read().contiguous()
        record = _record(piece, values, seq)
    except (RunError, RuntimeError) as failure:  # RuntimeError: more memory than there is
        findings.skip(str(piece.name), piece.source, str(failure).rstrip("."))
        return False
    sink.write(record, values)
    return True


def _record(piece: Piece, values: torch.Tensor, seq: int) -> TensorRecord:
    return TensorRecord(
        name=piece.name,
        native=piece.native,
        at=piece.at,
        shape=tuple(values.shape),
        dtype=dtype_name(values.dtype),
        device=piece.device,
        seq=seq,
        values="full",
        dims=piece.dims or _dims(piece.name, values),
        placement=piece.placement,
        stats=statistics_of(values),
    )


def _dims(name: TensorName, values: torch.Tensor) -> str | None:
    return dims_of(name.module, values.dim()) if name.tensor == "output" else None


def statistics_of(values: torch.Tensor) -> Statistics | None:
    """The statistics of the core; `None` of bits, which are no numbers."""
    try:
        return statistics(values)
    except NotSupported:
        return None


def _report(coverage: Coverage, findings: Findings, steps: int) -> Mapping[str, Any]:
    for name, reason in findings.gaps:
        coverage.gap(name, reason)
    for name, reason in findings.notes:
        coverage.note(name, reason)
    findings.gaps, findings.notes = [], []
    return coverage.report(steps=steps)
