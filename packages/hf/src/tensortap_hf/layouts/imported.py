"""Runs made of older files: one for each mode in a folder."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensortap.coverage import Coverage
from tensortap.errors import RunError
from tensortap.layouts import Moved, Progress, filling
from tensortap.names import TensorName
from tensortap.records import Coordinates, RunInfo, TensorRecord
from tensortap.sinks import CoverageSink, TensorSink
from tensortap.stats import statistics
from tensortap.store import RunDirectorySink
from tensortap.store.dtypes import dtype_name

UNKNOWN = "unknown"
"""The basis of older files, which do not say in which they are."""


@dataclass(frozen=True, slots=True)
class OldRun:
    """One mode: what its files say, and its tensors by sample, each under its name."""

    mode: str
    family: str
    basis: str
    format: str | None
    created: str
    model: str
    samples: Sequence[Sequence[tuple[str, torch.Tensor]]]
    metadata: Mapping[str, Any]

    @property
    def info(self) -> RunInfo:
        """The run's own description."""
        return RunInfo(
            launch_id=f"import-{uuid.uuid4().hex[:12]}",
            created=self.created,
            mode=self.mode,
            format=self.format,
            metadata={
                "model": self.model,
                "mode": {"name": self.mode, "family": self.family, "basis": self.basis},
                **self.metadata,
            },
        )


def write(runs: Sequence[OldRun], sink: TensorSink, files: int, progress: Progress) -> Moved:
    """One mode into the sink itself; of several each into a run directory below its path."""
    if len(runs) > 1 and not isinstance(sink, RunDirectorySink):
        modes = ", ".join(run.mode for run in runs)
        raise RunError(f"These are several runs ({modes}); only run directories can hold them.")
    done = 0
    for run in runs:
        target = sink
        if len(runs) > 1 and isinstance(sink, RunDirectorySink):
            target = copy(sink)
            target.path = sink.path / run.mode
        done = _fill(target, run, progress, done)
    return Moved(done, files)


def _fill(sink: TensorSink, run: OldRun, progress: Progress, done: int) -> int:
    """Each sample is a step; returns how many records there are now."""
    coverage, seq = Coverage(), 0
    with filling(sink, run.info):
        for step, tensors in enumerate(run.samples):
            for name, values in tensors:
                sink.write(_record(name, values, step, seq), values)
                coverage.captured(name)
                seq += 1
                progress(done + seq)
            sink.end_step(step)
        if isinstance(sink, CoverageSink):
            sink.cover(coverage.report(steps=len(run.samples)))
    return done + seq


def _record(name: str, values: torch.Tensor, step: int, seq: int) -> TensorRecord:
    return TensorRecord(
        name=TensorName.parse(name),
        native="",
        at=Coordinates(step=step),
        shape=tuple(values.shape),
        dtype=dtype_name(values.dtype),
        device="cpu",
        seq=seq,
        values="full",
        dims="batch seq hidden" if values.dim() == 3 else None,
        stats=statistics(values),
    )


def by_sample(
    tensors: Iterable[tuple[str, Sequence[torch.Tensor]]],
) -> list[list[tuple[str, torch.Tensor]]]:
    """From the samples of each tensor to the tensors of each sample."""
    found: list[list[tuple[str, torch.Tensor]]] = []
    for name, samples in tensors:
        for number, sample in enumerate(samples):
            if number == len(found):
                found.append([])
            found[number].append((name, sample))
    return found


def json_of(path: Path) -> Mapping[str, Any]:
    """A document beside the arrays; `{}` where there is none, as older tools left it."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise RunError(f"{path} cannot be read: {failure}") from failure
    if not isinstance(found, dict):
        raise RunError(f"{path} is not a JSON object.")
    return found
