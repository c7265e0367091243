"""From a tensor seen at a site to a record handed to the transfer."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensortap import backends
from tensortap.backends import Backend
from tensortap.config import Settings
from tensortap.coverage import Coverage
from tensortap.errors import SelectionError
from tensortap.graphs import outside_graph
from tensortap.integration import Site
from tensortap.names import interned
from tensortap.records import Coordinates, FormatInfo, Placement, TensorRecord, Values
from tensortap.steps import Frame, StepClock
from tensortap.transfer import Transfer
from tensortap.walk import tensors_in

SAMPLE = 4096
"""A sample holds between half and all of this many elements, or the whole of a smaller tensor."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A tensor seen at a site: what becomes a record once its values are on the way."""

    site: Site
    phase: str
    tensor: str
    at: Coordinates
    values: Values
    dims: str | None = None
    format: FormatInfo | None = None


class Choices:
    """Which tensors are recorded, and how: selection, phases and values, decided once a name."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: dict[tuple[str, str, str], Values | None] = {}

    def __call__(self, module: str, phase: str, tensor: str) -> Values | None:
        """How the tensor is to be recorded, or `None` when it is not selected."""
        key = (module, phase, tensor)
        try:
            return self._made[key]
        except KeyError:
            name = f"{module}/{phase}/{tensor}"
            chosen = phase in self._settings.phases and self._settings.select.matches(name)
            values = self._settings.values(name) if chosen else None
            self._made[key] = values
            return values

    def wants(self, site: Site) -> bool:
        """Could any tensor of the site be selected? Decides whether it is hooked at all."""
        for phase, prefix in (("forward", ""), ("backward", "grad_")):
            if phase not in self._settings.phases:
                continue
            for tensor in site.tensors:
                word = f"{prefix}{tensor}"
                if self(site.name, phase, word) is not None:
                    return True
                several = f"{site.name}/{phase}/{word}."
                if site.kind == "module" and self._settings.select.may_match(several):
                    return True
        return False

    def sites_in(self, sites: Sequence[Site], parameters: Sequence[str]) -> list[Site]:
        """The selected sites; raises `SelectionError` when not even a parameter is selected."""
        selected = [site for site in sites if self.wants(site)]
        if all(site.silent for site in selected) and not self._any(parameters):
            for site in selected:
                raise SelectionError(f"{site.name} cannot be captured: {site.silent}.")
            names = [f"{site.name}/forward/{tensor}" for site in sites for tensor in site.tensors]
            raise self._settings.select.nothing_in([*names, *parameters], "this model")
        return selected

    def _any(self, names: Sequence[str]) -> bool:
        return any(self(*name.split("/")) is not None for name in names)


class Capture:
    """The hot path of one tap. A failure in here never reaches the model unless asked to."""

    def __init__(
        self,
        settings: Settings,
        choices: Choices,
        clock: StepClock,
        transfer: Transfer,
        coverage: Coverage,
        failed: Callable[[BaseException], None],
    ) -> None:
        """`failed` is told of any exception in here; it decides whether to raise it."""
        self.clock = clock
        self.coverage = coverage
        self.choices = choices
        self.active = True
        self._exponents = settings.exponents
        self._transfer = transfer
        self._failed = failed
        self._on_stopped: Callable[[], None] | None = None
        self._backends: dict[str, Backend] = {}
        self._watched: dict[int, _Watched] = {}
        self._seq = itertools.count()
        self.enter = outside_graph(self._enter)
        """Begin a call of a site; `None` when its step is not selected."""
        self.see = outside_graph(self._see)
        """Record the selected tensors of a call, and have their gradients watched."""
        self.emit = outside_graph(self._emit_guarded)
        """Hand one tensor to the transfer under all its names; safe to call inside the model."""

    def stop(self, tell: Callable[[], None] | None = None) -> None:
        """Capture nothing from now on; the next call of a site tells why."""
        self.active = False
        self._on_stopped = tell

    def _enter(self, site: Site) -> SiteCall | None:
        if not self.active:
            if self._on_stopped is not None:
                self._on_stopped()
            return None
        frame = self.clock.frame()
        return SiteCall(self, site, frame, frame.enter(site.name)) if frame.selected else None

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
            for name, tensor in tensors_in(key, value):
                values = self.choices(site.name, "forward", name)
                if values is not None:
                    seen = Sighting(site, "forward", name, at, values, dims.get(name), format)
                    self._emit_guarded(tensor, [seen])
                if not (tensor.requires_grad and torch.is_grad_enabled()):
                    continue
                gradient = "grad_" + name
                values = self.choices(site.name, "backward", gradient)
                if values is not None:
                    seen = Sighting(site, "backward", gradient, forward, values, dims.get(name))
                    self._watch(tensor, call.frame, seen)

    def _watch(self, tensor: torch.Tensor, frame: Frame, seen: Sighting) -> None:
        """One hook serves every site that sees the same tensor: its total gradient is one value.

        The version tells an in-place result from the value before it: same object, other gradient.
        """
        watched = self._watched.get(id(tensor))
        if watched is None or not watched.is_for(tensor):
            watched = self._watched[id(tensor)] = _Watched(tensor, frame, self)
            tensor.register_hook(watched.fire)  # type: ignore[no-untyped-call]
        watched.seen.append(seen)

    def forget(self, key: int, watched: _Watched) -> None:
        """The tensor behind `key` is gone; its address may be another tensor's next."""
        if self._watched.get(key) is watched:
            del self._watched[key]

    def _emit_guarded(self, tensor: torch.Tensor, seen: Sequence[Sighting]) -> None:
        try:
            with torch.no_grad():
                self._emit(tensor, seen)
        except Exception as failure:  # Reported by `failed`; the model must go on.
            self._failed(failure)

    def _emit(self, tensor: torch.Tensor, seen: Sequence[Sighting]) -> None:
        plain = tensor if type(tensor) in _PLAIN else _local(tensor)
        reason = _unreadable(plain)
        if reason is not None:
            for sighting in seen:
                self._absent(_name(sighting), reason)
            return
        backend = self._backend(plain.device)
        reduction = backend.reduce(plain, exponents=self._exponents)
        for values, group in itertools.groupby(seen, key=lambda sighting: sighting.values):
            stride = _stride(plain.numel()) if values == "sample" else 1
            records = [self._record(plain, tensor, one, stride) for one in group]
            if values == "stats":
                self._transfer.statistics(records, backend, reduction)
                continue
            refused = self._transfer.payload(records, backend, reduction, plain)
            for record in records if refused else ():
                self.coverage.gap(str(record.name), str(refused))

    def _record(
        self, plain: torch.Tensor, tensor: torch.Tensor, seen: Sighting, stride: int
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
            placement=_placement(site, seen, tensor, plain),
            format=seen.format,
        )

    def _backend(self, device: torch.device) -> Backend:
        backend = self._backends.get(device.type)
        if backend is None:
            backend = self._backends[device.type] = backends.for_device(device)
        return backend

    def _absent(self, name: str, reason: str) -> None:
        remark = self.coverage.note if reason in _NOTES else self.coverage.gap
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
    ) -> None:
        """See `integration.Call.capture`."""
        named = self.site.dims if dims is None else {**self.site.dims, **dims}
        self._capture.see(self, tensors, named, format)


class _Watched:
    """Waits for the gradient of one tensor; holds the tensor weakly, or it would never be freed."""

    __slots__ = ("_capture", "_frame", "_tensor", "_version", "seen")

    def __init__(self, tensor: torch.Tensor, frame: Frame, capture: Capture) -> None:
        key = id(tensor)
        self._tensor = weakref.ref(tensor, lambda _: capture.forget(key, self))
        self._version = tensor._version
        self._frame = frame
        self._capture = capture
        self.seen: list[Sighting] = []

    def is_for(self, tensor: torch.Tensor) -> bool:
        return self._tensor() is tensor and self._version == tensor._version

    def fire(self, gradient: torch.Tensor | None) -> None:
        """Called by autograd once per backward pass, with the total gradient of the tensor."""
        if gradient is not None and self._capture.active:
            self._capture.clock.backward_reached(self._frame)
            self._capture.emit(gradient, self.seen)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_META = "meta tensor: it has a shape but no data"
_NOTES = (_META,)


def _has_memory(tensor: torch.Tensor) -> bool:
    """Wrapper subclasses and fake tensors have shapes but no bytes: reading them would crash."""
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())
    if isinstance(tensor, fake):
        return False
    try:
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # How functional tensors say no.
        return False


def _name(seen: Sighting) -> str:
    return str(interned(seen.site.name, seen.phase, seen.tensor))


def _stride(numel: int) -> int:
    return max(1, -(-numel // SAMPLE))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The piece of a DTensor that this rank holds; any other subclass as it is."""
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is not None and isinstance(tensor, dtensor):
        local: torch.Tensor = tensor.to_local()
        return local
    return tensor


def _placement(
    site: Site, seen: Sighting, tensor: torch.Tensor, plain: torch.Tensor
) -> Placement | None:
    if site.placement is not None:
        return site.placement(seen.phase, seen.tensor, plain)
    return None if plain is tensor else Placement(unknown=True)


def _unreadable(tensor: torch.Tensor) -> str | None:
    """Why the values of a tensor cannot be read here, or `None`."""
    if type(tensor) not in _PLAIN and not _has_memory(tensor):
        return f"{type(tensor).__name__}: a tensor subclass without memory of its own"
    if tensor.device.type == "meta":
        return _META
    if tensor.is_nested:
        return "nested tensor: not supported"
    if tensor.layout is not torch.strided:
        return f"{tensor.layout} tensor: only strided tensors are supported"
    if tensor.is_quantized:
        return "torch.quantized tensor: not supported, capture what it was made from"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "inside a torch.func transform: the tensor has no values of its own"
    return None
