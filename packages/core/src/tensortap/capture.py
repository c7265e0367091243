"""From a tensor seen at a site to a record handed to the transfer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from tensortap import backends
from tensortap.backends import Backend
from tensortap.choices import Choices
from tensortap.config import Settings
from tensortap.coverage import Coverage
from tensortap.errors import NotSupported
from tensortap.gradients import Gradients, Sighting
from tensortap.graphs import outside_graph
from tensortap.integration import Site
from tensortap.listener import Listener
from tensortap.names import interned
from tensortap.readable import NOTES, unreadable, unwrapped
from tensortap.records import Coordinates, FormatInfo, Placement, TensorRecord
from tensortap.steps import Frame, StepClock
from tensortap.transfer import Transfer
from tensortap.walk import tensors_in

P = ParamSpec("P")
R = TypeVar("R")

SAMPLE = 4096
"""A sample holds between half and all of this many elements, or the whole of a smaller tensor."""


class Capture:
    """The hot path of one tap. A failure in here never reaches the model unless asked to."""

    def __init__(
        self,
        settings: Settings,
        choices: Choices,
        clock: StepClock,
        transfer: Transfer,
        coverage: Coverage,
        listener: Listener,
    ) -> None:
        """`listener` is told of any exception in here; it decides whether to raise it."""
        self.clock = clock
        self.coverage = coverage
        self.choices = choices
        self.active = True
        self._exponents = settings.exponents
        self._transfer = transfer
        self._listener = listener
        self._on_stopped: Callable[[], None] | None = None
        self._backends: dict[str, Backend] = {}
        self._gradients = Gradients(self._gradient, clock.frame)
        self._seq = itertools.count()
        self.enter = self.guarded(self._enter)
        """Begin a call of a site; `None` when its step is not selected."""
        self.see = self.guarded(self._see)
        """Record the selected tensors of a call, and have their gradients watched."""
        self.bring = self.guarded(self._bring)
        """Record selected tensors of the backward of a call, which is under way."""
        self.mark = self.guarded(self._mark)
        """Have the first gradient of a forward tell which forward this backward belongs to."""
        self.emit = self.guarded(self._emit)
        """Hand one tensor to the transfer under all its names."""
        self.settle = self.guarded(transfer.run_overdue)
        """Before a step begins: have nothing left of the one before."""

    def stop(self, tell: Callable[[], None] | None = None) -> None:
        """Capture nothing from now on; the next call of a site tells why."""
        self.active = False
        self._on_stopped = tell
        if tell is None:
            self._gradients.release()

    def guarded(self, act: Callable[P, R]) -> Callable[P, R | None]:
        """`act` outside compiled graphs; what it raises goes to `failed`, not to the model."""

        def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
            if self._on_stopped is not None:
                self._on_stopped()
            try:
                return act(*args, **kwargs)
            except Exception as failure:  # `failed` reports it; the model must go on.
                self._listener.failed(failure)
                return None

        return outside_graph(guarded)

    def _enter(self, site: Site) -> SiteCall | None:
        if not self.active:
            return None
        frame = self.clock.frame()
        at = frame.enter(site.key)  # Also of a step that is not selected: calls are counted.
        return SiteCall(self, site, frame, at) if frame.selected else None

    def _see(
        self,
        call: SiteCall,
        tensors: Mapping[str, Any],
        dims: Mapping[str, str],
        format: FormatInfo | None,
    ) -> None:
        site, at = call.site, call.at
        forward = replace(at, recompute=False) if at.recompute else at
        for key, value in tensors.items() if self.active else ():
            for native, tensor in tensors_in(key, value):
                name = site.words.get(native, native)
                if name is None:
                    continue
                values = self.choices.of(site, "forward", name)
                if values is not None:
                    seen = Sighting(site, "forward", name, at, values, dims.get(name), format)
                    self._emit(tensor, [seen])
                if name in site.forward_only or not _gets_gradient(tensor):
                    continue
                gradient = "grad_" + name
                values = self.choices.of(site, "backward", gradient)
                if values is not None:
                    seen = Sighting(site, "backward", gradient, forward, values, dims.get(name))
                    self._gradients.watch(tensor, call.frame, seen)

    def _bring(
        self,
        call: SiteCall,
        tensors: Mapping[str, Any],
        dims: Mapping[str, str],
        format: FormatInfo | None,
    ) -> None:
        if not self.active:
            return
        self.clock.backward_reached(call.frame)
        forward = replace(call.at, recompute=False)
        for key, value in tensors.items():
            for name, tensor in tensors_in(key, value):
                values = self.choices.of(call.site, "backward", name)
                if values is not None:
                    seen = Sighting(
                        call.site, "backward", name, forward, values, dims.get(name), format
                    )
                    self._emit(tensor, [seen])

    def _mark(self, output: Any, frame: Frame) -> None:
        leads_on = False
        for _, tensor in tensors_in("output", output):
            if _gets_gradient(tensor):
                leads_on = True
                self._gradients.watch(tensor, frame, None)
        if not leads_on:
            self._transfer.end_inference(trained=self.clock.trained)

    def _gradient(self, gradient: torch.Tensor, frame: Frame, seen: Sequence[Sighting]) -> None:
        """A watched gradient arrived, of a tensor seen in `frame`."""
        if self.active:
            self.clock.backward_reached(frame)
            if seen:
                self.emit(gradient, seen)

    @torch.no_grad()
    def _emit(self, tensor: torch.Tensor, seen: Sequence[Sighting]) -> None:
        plain, whole = unwrapped(tensor)
        reason = unreadable(plain)
        if reason is not None:
            for sighting in seen:
                self._absent(_name(sighting), reason)
            return
        backend = self._backend(plain.device)
        if self.clock.every_step and not hasattr(backend, "lazy"):
            seen = [one for one in seen if self._listener.wants(one.at.step)]
        if not seen:
            return
        try:
            reduction = backend.reduce(plain, exponents=self._exponents)
        except NotSupported as refusal:
            for sighting in seen:
                self._absent(_name(sighting), str(refusal))
            return
        for values, group in itertools.groupby(seen, key=lambda sighting: sighting.values):
            stride = _stride(plain.numel()) if values == "sample" else 1
            records = [self._record(plain, one, stride, whole=whole) for one in group]
            if values == "stats":
                self._transfer.statistics(records, backend, reduction)
                continue
            refused = self._transfer.payload(records, backend, reduction, plain)
            if refused is not None:  # The statistics are there, and cost no room.
                bare = [replace(record, values="stats", stride=1) for record in records]
                self._transfer.statistics(bare, backend, reduction)
                for record in records:
                    self.coverage.gap(str(record.name), refused)

    def _record(
        self, plain: torch.Tensor, seen: Sighting, stride: int, *, whole: bool
    ) -> TensorRecord:
        site = seen.site
        return TensorRecord(
            name=interned(site.name, seen.phase, seen.tensor),
            native=site.native,
            at=seen.at,
            shape=tuple(plain.shape),
            dtype=str(plain.dtype)[6:],
            device=str(plain.device),
            seq=next(self._seq),
            values=seen.values,
            stride=stride,
            dims=seen.dims,
            placement=_placement(site, seen, plain, whole=whole),
            format=seen.format,
        )

    def _backend(self, device: torch.device) -> Backend:
        backend = self._backends.get(device.type)
        if backend is None:
            backend = self._backends[device.type] = backends.for_device(device)
        return backend

    def _absent(self, name: str, reason: str) -> None:
        remark = self.coverage.note if reason in NOTES else self.coverage.gap
        remark(name, reason)


class SiteCall:
    """One call of a site; implements the protocol `integration.Call`."""

    __slots__ = ("_capture", "at", "frame", "site")

    def __init__(self, capture: Capture, site: Site, frame: Frame, at: Coordinates) -> None:
        self._capture = capture
        self.site, self.frame, self.at = site, frame, at

    def capture(
        self,
        tensors: Mapping[str, Any],
        *,
        dims: Mapping[str, str] | None = None,
        format: FormatInfo | None = None,
        phase: Literal["forward", "backward"] = "forward",
    ) -> None:
        """See `integration.Call.capture`."""
        named = self.site.dims if dims is None else {**self.site.dims, **dims}
        record = self._capture.see if phase == "forward" else self._capture.bring
        record(self, tensors, named, format)


def _gets_gradient(tensor: torch.Tensor) -> bool:
    """Will autograd bring a gradient for this use of the tensor?"""
    return tensor.requires_grad and torch.is_grad_enabled() and not tensor.is_inference()


def _name(seen: Sighting) -> str:
    return str(interned(seen.site.name, seen.phase, seen.tensor))


def _stride(numel: int) -> int:
    return max(1, -(-numel // SAMPLE))


def _placement(site: Site, seen: Sighting, plain: torch.Tensor, *, whole: bool) -> Placement | None:
    if site.placement is not None:
        return site.placement(seen.phase, seen.tensor, plain)
    return None if whole else Placement(unknown=True)
