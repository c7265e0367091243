"""`TensorSink`: where records go. A sink is called from one thread at a time, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from tensortap.records import RunInfo, TensorRecord, Values


@runtime_checkable
class TensorSink(Protocol):
    """Anything that takes records; the second argument of `attach` may be one."""

    def open(self, run: RunInfo) -> None:
        """Start a run; called once, before any record."""

    def write(self, record: TensorRecord, payload: torch.Tensor | None) -> None:
        """Write one record; called once per captured tensor, from the transfer thread.

        `payload` is a contiguous CPU tensor, or `None` when the record carries statistics
        only. Its memory is used again after the call: a sink that keeps it makes a copy.
        """

    def end_step(self, step: int) -> None:
        """All records of `step` that were captured have been written."""

    def close(self) -> None:
        """The run is over; called once, also after a failed write."""


@runtime_checkable
class CoverageSink(Protocol):
    """A sink that also keeps the coverage report, as `tensortap.coverage` writes it."""

    def cover(self, report: Mapping[str, Any]) -> None:
        """Take the report; called once, before `close`."""


@runtime_checkable
class PayloadSink(Protocol):
    """A sink that is of no use without values, and says what `attach` records by default."""

    default_values: Values


class MemorySink:
    """Keeps everything in lists; for notebooks and tests."""

    def __init__(self) -> None:
        self.run: RunInfo | None = None
        self.records: list[TensorRecord] = []
        self.payloads: list[torch.Tensor | None] = []
        self.steps: list[int] = []
        self.coverage: Mapping[str, Any] | None = None
        self.closed = False

    def open(self, run: RunInfo) -> None:
        self.run = run

    def write(self, record: TensorRecord, payload: torch.Tensor | None) -> None:
        self.records.append(record)
        self.payloads.append(None if payload is None else payload.clone())

    def end_step(self, step: int) -> None:
        self.steps.append(step)

    def cover(self, report: Mapping[str, Any]) -> None:
        self.coverage = report

    def close(self) -> None:
        self.closed = True

    def names(self) -> list[str]:
        """Sorted names, each once."""
        return sorted({str(record.name) for record in self.records})

    def find(self, name: str) -> list[tuple[TensorRecord, torch.Tensor | None]]:
        """Records called `name` with their payloads, in order of capture."""
        pairs = zip(self.records, self.payloads, strict=True)
        return [(record, payload) for record, payload in pairs if str(record.name) == name]


class TeeSink:
    """Hands every record to several sinks; all are closed even when one of them fails."""

    def __init__(self, *sinks: TensorSink) -> None:
        self._sinks = sinks
        wanted = {sink.default_values for sink in sinks if isinstance(sink, PayloadSink)}
        self.default_values: Values = "full" if "full" in wanted else (*wanted, "stats")[0]

    def open(self, run: RunInfo) -> None:
        for opened, sink in enumerate(self._sinks):
            try:
                sink.open(run)
            except BaseException:
                for earlier in self._sinks[:opened]:
                    earlier.close()
                raise

    def write(self, record: TensorRecord, payload: torch.Tensor | None) -> None:
        for sink in self._sinks:
            sink.write(record, payload)

    def end_step(self, step: int) -> None:
        for sink in self._sinks:
            sink.end_step(step)

    def cover(self, report: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            if isinstance(sink, CoverageSink):
                sink.cover(report)

    def close(self) -> None:
        failures: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as failure:
                failures.append(failure)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise RuntimeError("; ".join(str(failure) for failure in failures)) from failures[0]
