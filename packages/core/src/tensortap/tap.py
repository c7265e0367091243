"""`attach` and `Tap`: what users hold of a tapped model."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tensortap.config import Settings
from tensortap.coverage import Coverage
from tensortap.errors import CaptureError, CaptureWarning, ConfigError
from tensortap.launch import rank_and_world
from tensortap.names import TensorName
from tensortap.records import Values
from tensortap.session import Session
from tensortap.sinks import PayloadSink, TensorSink
from tensortap.targets import lazily_run, modules_to_tap
from tensortap.wrappers import unwrap

_attached: set[Tap] = set()


def attach(
    model: nn.Module | Sequence[nn.Module],
    sink: str | os.PathLike[str] | TensorSink | None = None,
    **options: Any,
) -> Tap:
    """Tap a model: from now on its selected tensors are recorded, until `detach`.

    `model` is a module, or the list of a pipeline's chunks. `sink` is a run directory to make,
    or any `TensorSink`; by default `tensortap_runs/<UTC time>-<model class>`. Options come
    before the environment (`TENSORTAP_SELECT`, …), which comes before the defaults:

    select       names to capture: globs with commas, `!` excludes, `re:` regular expression
    values       "stats" (default), "full", "sample", or {glob: one of these}
    phases       of "forward", "backward", "param", "grad"; default: all
    steps, ranks "0:100:10", "0,8"; default: all
    exponents    also count the values of each power-of-two exponent
    max_pending  host memory for payloads in flight ("256MiB"); on_full: "wait" or "drop"
    max_bytes    size limit of the run on disk; durable: fsync at "close" or every "step"
    on_error     "warn" (default: capturing stops, the model goes on) or "raise"
    overwrite    replace an existing run; using: the integration; metadata: kept in the run

    Raises `ConfigError`, `SelectionError`, `NotSupported`, `AlreadyAttached` or `RunExists`, and
    leaves nothing behind when it does.
    """
    default: Values = sink.default_values if isinstance(sink, PayloadSink) else "stats"
    settings = Settings.resolve(options, values=default)
    tap = Tap(settings)
    lazy = lazily_run(model) if settings.enabled else []
    rank, world = rank_and_world()
    if world == 1 and lazy:  # A launcher of their own may have started others.
        rank, world = lazy[0].place()
    if settings.enabled and not any(number in settings.ranks for number in range(world)):
        said = f"ranks={settings.ranks.text!r}, but the ranks are 0 to {world - 1}"
        warnings.warn(f"{said}: nothing is captured.", CaptureWarning, stacklevel=2)
    if settings.enabled and (rank in settings.ranks or lazy):
        roots = [unwrap(module) for module in modules_to_tap(model)]
        tap._begin(roots, sink, (rank, world))
    return tap


def detach_all() -> None:
    """Detach every tap of this process, such as one that a failed notebook cell left behind."""
    for tap in list(_attached):
        try:
            tap.detach()
        except CaptureError as failure:  # A cell that failed early: the others must go as well.
            warnings.warn(str(failure), CaptureWarning, stacklevel=2)


class Tap:
    """An observer of one model; also a context manager that detaches at its end."""

    path: Path | None = None
    """The run directory, when records go to one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.coverage = Coverage()
        self._session: Session | None = None
        self._detaching = threading.Lock()

    @property
    def attached(self) -> bool:
        """Is anything installed? Not when disabled, on another rank, or after `detach`."""
        return self._session is not None

    def step(self) -> None:
        """End the step here; from the first call on, nothing else ends steps."""
        if self._session is not None:
            self._session.clock.manual_step()

    def record(self, name: str, tensor: torch.Tensor, *, dims: str | None = None) -> None:
        """Record any tensor by hand as `module/phase/tensor`, in the step under way.

        The selection of names does not apply, those of steps and ranks do.
        """
        parsed = TensorName.parse(name)
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(
                f"record({name!r}, …) takes a torch.Tensor, not {type(tensor).__name__}; "
                "a number becomes one with torch.tensor(number)."
            )
        if self._session is not None:
            self._session.record(parsed, tensor, dims)

    def detach(self) -> None:
        """Write what is pending, remove every trace from the model, close the run.

        Raises `CaptureError` when nothing at all was captured, or, under `on_error="raise"`,
        when capturing failed. Calling it again does nothing.
        """
        with self._detaching:
            session, self._session = self._session, None
        if session is not None:
            _attached.discard(self)
            atexit.unregister(self._at_exit)
            session.end()

    def __enter__(self) -> Tap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.detach()
            return
        try:
            self.detach()
        except CaptureError as failure:  # The error on its way out says more.
            warnings.warn(str(failure), CaptureWarning, stacklevel=2)

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<tensortap.Tap {state}, {self.coverage.total} records, {self.path or 'no run'}>"

    def _begin(self, roots: list[nn.Module], sink: Any, place: tuple[int, int]) -> None:
        self._session = Session(self.settings, self.coverage, roots, sink, place)
        self.path = self._session.path
        _attached.add(self)
        atexit.register(self._at_exit)

    def _at_exit(self) -> None:
        """The interpreter ends without `detach`: the last step is still written."""
        try:
            self.detach()
        except CaptureError as failure:
            print(f"tensortap: {failure}", file=sys.stderr)
