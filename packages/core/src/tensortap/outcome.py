"""How a capture ends: whole, failed on the way, or with nothing at all; said once."""

from __future__ import annotations

import warnings

from tensortap.config import Settings
from tensortap.coverage import Coverage
from tensortap.errors import CaptureError, CaptureWarning
from tensortap.steps import StepClock


class Outcome:
    """The first failure of a tap, and the one message about how it ended."""

    def __init__(
        self,
        settings: Settings,
        coverage: Coverage,
        clock: StepClock,
        *,
        may_be_empty: bool = False,
    ) -> None:
        """`may_be_empty`: all that is selected lies on other ranks."""
        self._may_be_empty = may_be_empty
        self._settings = settings
        self._coverage = coverage
        self._clock = clock
        self._failure: BaseException | None = None
        self._reported = False

    def failed(self, failure: BaseException) -> None:
        """Capturing broke, perhaps in the transfer thread; only the first failure counts."""
        if self._failure is None:
            self._failure = failure
            self._coverage.gap("*", f"capture stopped: {type(failure).__name__}: {failure}")

    def report(self) -> None:
        """Say, in the thread of the model, that the capture failed or wrote nothing.

        A failure is a warning, or raised under `on_error="raise"`; an empty capture is raised.
        """
        if self._reported:
            return
        self._reported = True
        if self._failure is not None:
            cause = f"{type(self._failure).__name__}: {self._failure}"
            message = f"tensortap stopped capturing, the run is incomplete: {cause}"
            if self._settings.on_error == "raise":
                raise CaptureError(message) from self._failure
            warnings.warn(message, CaptureWarning, stacklevel=2)
        elif self._may_be_empty:
            return
        elif not self._coverage.total or self._only_gradients():
            raise CaptureError(f"tensortap captured nothing: {self._why_nothing()}")

    def _only_gradients(self) -> bool:
        """Gradients of parameters came, yet no module was called: compiled code skips hooks."""
        phases = {phase for _, phase in self._coverage.places()}
        return "grad" in phases and "forward" not in phases and self._clock.opened == 0

    def _why_nothing(self) -> str:
        if self._clock.opened == 0:
            return (
                "the model was not called while it was attached, or only inside code that "
                "torch.compile had made before. Attach before the first call."
            )
        steps = self._settings.steps
        if not any(step in steps for step in range(self._clock.step)):
            return (
                f"steps={steps.text!r}, but there were {self._clock.step} steps, counted from 0. "
                "In training a step ends when an optimizer steps, or at tap.step()."
            )
        gaps = self._coverage.report(steps=self._clock.step)["gaps"]
        return gaps[0]["reason"] if gaps else "no selected module was called."
