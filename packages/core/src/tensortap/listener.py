"""What a tap is told about the captures on their way to the sink, and what it makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

from tensortap.config import Settings
from tensortap.coverage import Coverage
from tensortap.errors import CaptureError, CaptureWarning
from tensortap.outcome import Outcome
from tensortap.records import TensorRecord


class Listener(Protocol):
    """What the transfer asks, and whom it tells."""

    def wants(self, step: int) -> bool:
        """Is this step recorded, on this rank?"""

    def written(self, record: TensorRecord) -> None:
        """The sink has the record; called from the transfer thread."""

    def lost(self, record: TensorRecord, reason: str) -> None:
        """The record goes without the payload it was to have."""

    def read_early(self, between: str) -> None:
        """The user's own code ran a part of a lazy graph between two captures of it."""

    def stopped(self, failure: BaseException) -> None:
        """Capturing broke in the transfer thread; called at most once."""

    def failed(self, failure: BaseException) -> None:
        """Capturing broke in a thread of the model."""


class TapListener:
    """The listener of one tap: keeps its coverage, and ends it when it fails."""

    def __init__(
        self,
        settings: Settings,
        coverage: Coverage,
        outcome: Outcome,
        *,
        recorded: bool,
        stop: Callable[[Callable[[], None]], None],
    ) -> None:
        """`recorded`: is this rank? `stop(tell)` ends the capture; the next hook calls `tell`."""
        self._settings, self._coverage, self._outcome = settings, coverage, outcome
        self._recorded, self._stop = recorded, stop
        self._warned = False

    def wants(self, step: int) -> bool:
        """Selected by `steps=` and `ranks=`."""
        return self._recorded and step in self._settings.steps

    def written(self, record: TensorRecord) -> None:
        """Count it."""
        self._coverage.captured(str(record.name))

    def lost(self, record: TensorRecord, reason: str) -> None:
        """A gap."""
        self._coverage.gap(str(record.name), reason)

    def read_early(self, between: str) -> None:
        """The values are right; but the graph runs more than once, so it is said, or raised."""
        message = (
            "the step's code read a value (.item(), .cpu(), print, an `if` on a tensor) between "
            f"{between}: a part of the lazy graph ran by itself, and again with the rest. "
            "Read it after the step's synchronisation."
        )
        self._coverage.note("root", message)
        if self._settings.on_error == "raise":
            raise CaptureError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(f"tensortap: {message}", CaptureWarning, stacklevel=2)

    def stopped(self, failure: BaseException) -> None:
        """Stop capturing; the next hook says why."""
        self._outcome.failed(failure)
        self._stop(self._outcome.report)

    def failed(self, failure: BaseException) -> None:
        """Stop capturing, and say why at once."""
        self.stopped(failure)
        self._outcome.report()
