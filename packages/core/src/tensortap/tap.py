"""`attach` and `Tap`: selection -> hooks -> reduction -> sink, and every trace gone on `detach`."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tensortap.capture import Capture
from tensortap.choices import Choices
from tensortap.config import Settings
from tensortap.coverage import Coverage, explain_absences
from tensortap.destination import destination
from tensortap.discovery import aliases, better_integration, discover, told_apart
from tensortap.errors import CaptureError, CaptureWarning, ConfigError, NotSupported
from tensortap.gradients import Sighting
from tensortap.hooks import ContainerHooks, ModuleHooks, ancestors
from tensortap.integration import Integration, Site, SpreadModels
from tensortap.launch import rank_and_world
from tensortap.listener import TapListener
from tensortap.names import TensorName, escape
from tensortap.observer import TapObserver
from tensortap.optimizers import watch_optimizers
from tensortap.outcome import Outcome
from tensortap.parameters import ParameterHooks
from tensortap.records import RunInfo, Values
from tensortap.runinfo import describe_run
from tensortap.sinks import CoverageSink, PayloadSink, TensorSink
from tensortap.steps import Frame, StepClock
from tensortap.targets import lazily_run, mark_tapped, modules_to_tap
from tensortap.transfer import Transfer
from tensortap.undo import Undo
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
        with Undo() as undo:
            tap._install(roots, sink, (rank, world), undo)
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
        self._undo: Undo | None = None
        self._detaching = threading.Lock()

    @property
    def attached(self) -> bool:
        """Is anything installed? Not when disabled, on another rank, or after `detach`."""
        return self._undo is not None

    def step(self) -> None:
        """End the step here; from the first call on, nothing else ends steps."""
        if self.attached:
            self._clock.manual_step()

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
        if not self.attached or not self._capture.active:
            return
        frame = self._clock.frame()
        if frame.selected:
            site = Site(parsed.module, "", self._roots[0])
            at = frame.count(f"by hand: {name}")
            values = self.settings.values(name)
            seen = Sighting(site, parsed.phase, parsed.tensor, at, values, dims)
            self._capture.emit(tensor, [seen])

    def detach(self) -> None:
        """Write what is pending, remove every trace from the model, close the run.

        Raises `CaptureError` when nothing at all was captured, or, under `on_error="raise"`,
        when capturing failed. Calling it again does nothing.
        """
        with self._detaching:
            undo, self._undo = self._undo, None
        if undo is None:
            return
        _attached.discard(self)
        atexit.unregister(self._at_exit)
        if os.getpid() != self._pid:  # A forked child: the run is its parent's.
            self._capture.stop()
            undo.run()
            return
        with ExitStack() as last_to_first:
            last_to_first.callback(self._outcome.report)
            last_to_first.callback(self._close_sink)
            last_to_first.callback(self._close_transfer)
            last_to_first.callback(self._capture.stop)
            last_to_first.callback(undo.run)
            self._clock.finish()

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

    def _install(
        self, roots: list[nn.Module], sink: Any, place: tuple[int, int], undo: Undo
    ) -> None:
        plugins = [discover(root, self.settings.using) for root in roots]
        sites = told_apart([p.sites(root) for p, root in zip(plugins, roots, strict=True)])
        every = [site for some in sites for site in some]
        choices = Choices(self.settings)
        self._roots = roots
        self._parameters = ParameterHooks(every, choices)
        parameters = self._parameters.names()
        elsewhere = [name for p, root in zip(plugins, roots, strict=True) for name in _far(p, root)]
        self._selected = choices.sites_in(every, parameters, elsewhere)
        choices.warn_of_dead(every, [*parameters, *elsewhere])
        self._note(roots, plugins)
        self._start(sink, describe_run(self.settings, roots, plugins, place), choices)
        try:
            self._hook(undo)
            observer = TapObserver(self._capture, self._selected)
            for root, plugin, some in zip(roots, plugins, sites, strict=True):
                plugin.install(root, some, observer, undo)
        except BaseException:
            self._transfer.close()
            self._sink.close()
            raise
        self._undo, self._pid = undo, os.getpid()
        _attached.add(self)
        atexit.register(self._at_exit)

    def _note(self, roots: Sequence[nn.Module], plugins: Sequence[Integration]) -> None:
        """Say in the coverage what is known before anything runs."""
        for root, plugin in zip(roots, plugins, strict=True):
            hint = better_integration(root) if plugin.name == "native" else None
            if hint is not None:
                self.coverage.note("root", hint)
            for again, first in aliases(root):
                self.coverage.note(escape(again), f"the same module as {first}, captured there")

    def _start(self, sink: Any, info: RunInfo, choices: Choices) -> None:
        """Open the sink and the transfer to it. Raises `NotSupported` where nothing can be kept."""
        lazy = lazily_run(self._roots)
        for backend in lazy:
            reason = backend.refuse()
            if reason is not None:
                raise NotSupported(reason)
        self._sink, self.path = destination(sink, self.settings, info)
        self._sink.open(info)
        self._clock = StepClock(
            rank=info.rank,
            steps=self.settings.steps,
            begin=self._begin_step,
            end=self._end_step,
            every_step=bool(lazy),
        )
        here = bool(self._selected) or choices.selects_any(self._parameters.names())
        recorded = info.rank in self.settings.ranks
        self._outcome = Outcome(
            self.settings, self.coverage, self._clock, may_be_empty=not (here and recorded)
        )
        self._listener = TapListener(
            self.settings,
            self.coverage,
            self._outcome,
            recorded=recorded,
            stop=lambda tell: self._capture.stop(tell),
        )
        self._transfer = Transfer(
            self._sink,
            self._listener,
            max_pending=self.settings.max_pending,
            on_full=self.settings.on_full,
        )
        self._capture = Capture(
            self.settings, choices, self._clock, self._transfer, self.coverage, self._listener
        )

    def _hook(self, undo: Undo) -> None:
        """Install hooks; a container's end comes last, after what is captured at its end."""
        tapped = [site.module for site in self._selected]
        containers = [
            ContainerHooks(self._capture, module, root=module is root)
            for root in self._roots
            for module in ancestors(root, tapped)
        ]
        for container in containers:
            container.install(undo)
        for site in self._selected:
            if site.kind == "module" and site.silent is None:
                ModuleHooks(self._capture, site).install(undo)
        for container in containers:
            container.install_end(undo)
        self._parameters.install(self._capture, undo)
        parameters = [p for root in self._roots for p in root.parameters()]
        watch_optimizers(parameters, self._clock.optimizers_stepped, undo)
        mark_tapped(self._roots, undo)

    def _begin_step(self, frame: Frame) -> None:
        if self._capture.active:
            self._capture.settle()
        self._parameters.begin_step(frame)

    def _end_step(self, step: int, selected: bool) -> None:
        if selected and self._capture.active:
            try:
                self._transfer.end_step(step)
            except Exception as failure:  # The listener reports it; the model must go on.
                self._listener.failed(failure)

    def _close_transfer(self) -> None:
        try:
            self._transfer.close()
        except Exception as failure:  # The outcome reports it, which comes last.
            self._listener.stopped(failure)

    def _close_sink(self) -> None:
        try:
            explain_absences(self.coverage, self._selected, explicit=self.settings.explicit)
            if isinstance(self._sink, CoverageSink):
                self._sink.cover(self.coverage.report(steps=self._clock.counted))
            self._sink.close()
        except Exception as failure:  # The outcome reports it, which comes next.
            self._listener.stopped(failure)

    def _at_exit(self) -> None:
        """The interpreter ends without `detach`: the last step is still written."""
        try:
            self.detach()
        except CaptureError as failure:
            print(f"tensortap: {failure}", file=sys.stderr)


def _far(plugin: Integration, root: nn.Module) -> Sequence[str]:
    """Names that sites of other ranks may have."""
    return plugin.elsewhere(root) if isinstance(plugin, SpreadModels) else ()
