"""`Session`: one tapped model, from its first hook to the end of its run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from tensortap.capture import Capture
from tensortap.choices import Choices
from tensortap.config import Settings
from tensortap.coverage import Coverage, explain_absences
from tensortap.destination import destination
from tensortap.discovery import aliases, better_integration, discover, told_apart
from tensortap.errors import NotSupported
from tensortap.gradients import Sighting
from tensortap.hooks import ContainerHooks, ModuleHooks, ancestors
from tensortap.integration import Integration, Site, SpreadModels
from tensortap.listener import TapListener
from tensortap.names import TensorName, escape
from tensortap.observer import TapObserver
from tensortap.optimizers import watch_optimizers
from tensortap.outcome import Outcome
from tensortap.parameters import ParameterHooks
from tensortap.records import RunInfo
from tensortap.runinfo import describe_run
from tensortap.sinks import CoverageSink
from tensortap.steps import Frame, StepClock
from tensortap.targets import lazily_run, mark_tapped
from tensortap.transfer import Transfer
from tensortap.undo import Undo


class Session:
    """What an attached tap consists of: selection -> hooks -> reduction -> sink.

    Made whole or not at all: where the constructor raises, model and disk are as they were.
    """

    def __init__(
        self,
        settings: Settings,
        coverage: Coverage,
        roots: Sequence[nn.Module],
        sink: Any,
        place: tuple[int, int],
    ) -> None:
        self.settings, self.coverage, self.roots = settings, coverage, roots
        self._pid = os.getpid()
        with Undo() as self._undo:
            plugins = [discover(root, settings.using) for root in roots]
            sites = told_apart([p.sites(root) for p, root in zip(plugins, roots, strict=True)])
            choices = Choices(settings)
            self._choose(plugins, [site for some in sites for site in some], choices)
            self._note(plugins)
            self._open(sink, describe_run(settings, roots, plugins, place), choices)
            try:
                self._hook(self._undo)
                observer = TapObserver(self.capture, self._selected)
                for root, plugin, some in zip(roots, plugins, sites, strict=True):
                    plugin.install(root, some, observer, self._undo)
            except BaseException:
                self.transfer.close()
                self._sink.close()
                raise

    def record(self, name: TensorName, tensor: torch.Tensor, dims: str | None) -> None:
        """Record a tensor by hand, if this step and rank are selected."""
        frame = self.clock.frame()
        if self.capture.active and frame.selected:
            site = Site(name.module, "", self.roots[0])
            at = frame.count(f"by hand: {name}")
            values = self.settings.values(str(name))
            seen = Sighting(site, name.phase, name.tensor, at, values, dims)
            self.capture.emit(tensor, [seen])

    def end(self) -> None:
        """Write what is pending, remove every trace from the model, close the sink.

        Raises `CaptureError` as `Tap.detach` says. In a forked child only the traces go: the run
        is its parent's.
        """
        if os.getpid() != self._pid:
            self.capture.stop()
            self._undo.run()
            return
        with ExitStack() as last_to_first:
            last_to_first.callback(self._outcome.report)
            last_to_first.callback(self._close_sink)
            last_to_first.callback(self._close_transfer)
            last_to_first.callback(self.capture.stop)
            last_to_first.callback(self._undo.run)
            self.clock.finish()

    def _choose(
        self, plugins: Sequence[Integration], sites: Sequence[Site], choices: Choices
    ) -> None:
        """Decide what to tap; raises `SelectionError` where that is nothing."""
        self._parameters = ParameterHooks(sites, choices)
        parameters = self._parameters.names()
        both = zip(plugins, self.roots, strict=True)
        elsewhere = [name for plugin, root in both for name in _far(plugin, root)]
        self._selected = choices.sites_in(sites, parameters, elsewhere)
        choices.warn_of_dead(sites, [*parameters, *elsewhere])

    def _note(self, plugins: Sequence[Integration]) -> None:
        """Say in the coverage what is known before anything runs."""
        for root, plugin in zip(self.roots, plugins, strict=True):
            hint = better_integration(root) if plugin.name == "native" else None
            if hint is not None:
                self.coverage.note("root", hint)
            for again, first in aliases(root):
                self.coverage.note(escape(again), f"the same module as {first}, captured there")

    def _open(self, sink: Any, info: RunInfo, choices: Choices) -> None:
        """Open the sink and the transfer to it. Raises `NotSupported` where nothing can be kept."""
        lazy = lazily_run(self.roots)
        for backend in lazy:
            reason = backend.refuse()
            if reason is not None:
                raise NotSupported(reason)
        self._sink, self.path = destination(sink, self.settings, info)
        self._sink.open(info)
        self.clock = StepClock(
            rank=info.rank,
            steps=self.settings.steps,
            begin=self._begin_step,
            end=self._end_step,
            every_step=bool(lazy),
        )
        here = bool(self._selected) or choices.selects_any(self._parameters.names())
        recorded = info.rank in self.settings.ranks
        self._outcome = Outcome(
            self.settings, self.coverage, self.clock, may_be_empty=not (here and recorded)
        )
        self._listener = TapListener(
            self.settings,
            self.coverage,
            self._outcome,
            recorded=recorded,
            stop=lambda tell: self.capture.stop(tell),
        )
        self.transfer = Transfer(
            self._sink,
            self._listener,
            max_pending=self.settings.max_pending,
            on_full=self.settings.on_full,
        )
        self.capture = Capture(
            self.settings, choices, self.clock, self.transfer, self.coverage, self._listener
        )

    def _hook(self, undo: Undo) -> None:
        """Install hooks; a container's end comes last, after what is captured at its end."""
        tapped = [site.module for site in self._selected]
        containers = [
            ContainerHooks(self.capture, module, root=module is root)
            for root in self.roots
            for module in ancestors(root, tapped)
        ]
        for container in containers:
            container.install(undo)
        for site in self._selected:
            if site.kind == "module" and site.silent is None:
                ModuleHooks(self.capture, site).install(undo)
        for container in containers:
            container.install_end(undo)
        self._parameters.install(self.capture, undo)
        parameters = [p for root in self.roots for p in root.parameters()]
        watch_optimizers(parameters, self.clock.optimizers_stepped, undo)
        mark_tapped(self.roots, undo)

    def _begin_step(self, frame: Frame) -> None:
        if self.capture.active:
            self.capture.settle()
        self._parameters.begin_step(frame)

    def _end_step(self, step: int, selected: bool) -> None:
        if selected and self.capture.active:
            try:
                self.transfer.end_step(step)
            except Exception as failure:  # The listener reports it; the model must go on.
                self._listener.failed(failure)

    def _close_transfer(self) -> None:
        try:
            self.transfer.close()
        except Exception as failure:  # The outcome reports it, which comes last.
            self._listener.stopped(failure)

    def _close_sink(self) -> None:
        try:
            explain_absences(self.coverage, self._selected, explicit=self.settings.explicit)
            if isinstance(self._sink, CoverageSink):
                self._sink.cover(self.coverage.report(steps=self.clock.counted))
            self._sink.close()
        except Exception as failure:  # The outcome reports it, which comes next.
            self._listener.stopped(failure)


def _far(plugin: Integration, root: nn.Module) -> Sequence[str]:
    """Names that sites of other ranks may have."""
    return plugin.elsewhere(root) if isinstance(plugin, SpreadModels) else ()
