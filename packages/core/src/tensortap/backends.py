"""`Backend`: reduction, snapshot and transfer of tensors on one type of device.

Third parties register theirs as an entry point of the group `tensortap.backends`; the entry
point's name is the device type (`xla`), its value a class or function that is called without
arguments. `tensortap.testing.BackendContract` is the test class for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Protocol, cast

import torch

from tensortap.errors import NotSupported, PluginError
from tensortap.plugins import BACKENDS, load_plugin
from tensortap.records import Statistics
from tensortap.stats import finish, raw, statistics

Allocate = Callable[[int], torch.Tensor]
"""Bytes -> a 1-d uint8 CPU tensor of at least that size, pinned on a machine with CUDA."""


class Reduction(Protocol):
    """Statistics of one tensor on their way to the host; opaque to all but its backend."""


class Snapshot(Protocol):
    """A copy of a tensor that later writes to the tensor do not change."""

    nbytes: int

    def host(self) -> torch.Tensor:
        """The copy as a contiguous CPU tensor; may block, called from the transfer thread."""


class Backend(Protocol):
    """The plugin for one device type; entry points of `tensortap.backends` are named after it."""

    def reduce(self, tensor: torch.Tensor, *, exponents: bool) -> Reduction:
        """Start computing statistics on the tensor's device, without a host synchronisation."""

    def snapshot(self, tensor: torch.Tensor, allocate: Allocate, *, stride: int = 1) -> Snapshot:
        """Copy the tensor, or every `stride`-th element of it in logical order, likewise."""

    def flush(self, reductions: Sequence[Reduction]) -> list[Statistics]:
        """Bring all reductions to the host at once: one synchronisation, one batch of copies."""


class DeferredBackend(Backend, Protocol):
    """A backend whose captures stay on the device until the step is over; `lazy` marks it.

    `reduce` and `snapshot` may return the same object for the same value seen twice.
    """

    lazy: bool
    """Have its tensors no values before their graph has run? It is a `LazyBackend` then."""

    def collect(
        self, reductions: Sequence[Reduction], snapshots: Sequence[Snapshot]
    ) -> list[Statistics]:
        """Bring all of it to the host by one transfer; `Snapshot.host` waits for nothing then."""


class LazyBackend(DeferredBackend, Protocol):
    """A backend that only adds to a graph, which is run by whoever synchronises.

    What a step adds must be the same in every step, or its graph is compiled again: the tap
    captures in steps and on ranks that are not selected as well, and drops that later.
    """

    def watch(self, ran: Callable[[], None]) -> None:
        """Call `ran` once, as soon as the graph under way has been run by anybody."""

    def run(self) -> bool:
        """Run the graph of everything alive; false where running it is forbidden just now."""

    def runs(self) -> int:
        """How many graphs this process has run, those that a read of a value caused included."""

    def place(self) -> tuple[int, int]:
        """Rank and world size, asked for where neither torch.distributed nor a launcher tells."""

    def refuse(self) -> str | None:
        """Why nothing worth keeping can be captured in this process, or `None`."""


def lazy_backends(devices: Iterable[torch.device]) -> list[LazyBackend]:
    """Those of the devices' backends that are lazy; devices nobody serves are left out."""
    kinds = {device.type for device in devices} - _BUILT_IN.keys()
    served = [kind for kind in sorted(kinds) if entry_points(group=BACKENDS, name=kind)]
    found = [_for_type(kind) for kind in served]
    return [cast("LazyBackend", backend) for backend in found if getattr(backend, "lazy", False)]


def for_device(device: torch.device) -> Backend:
    """The backend for tensors on `device`, one per device type and process.

    An installed plugin goes before the built-in backends. Raises `NotSupported` when there is
    none, `PluginError` when there is one and it is broken.
    """
    return _for_type(device.type)


@cache
def _for_type(kind: str) -> Backend:
    plugins = entry_points(group=BACKENDS, name=kind)
    if len(plugins) > 1:
        both = ", ".join(sorted(plugin.value for plugin in plugins))
        raise PluginError(f"Several plugins serve {kind} tensors: {both}. Uninstall all but one.")
    for plugin in plugins:
        return _checked(load_plugin(plugin)(), plugin.value)
    if kind not in _BUILT_IN:
        raise NotSupported(
            f"Tensors on {kind!r} devices cannot be captured: core serves "
            f"{' and '.join(_BUILT_IN)}, and no installed package has an entry point {kind!r} in "
            f"the group {BACKENDS}."
        )
    return _BUILT_IN[kind]()


def _checked(backend: Backend, source: str) -> Backend:
    missing = [name for name in ("reduce", "snapshot", "flush") if not hasattr(backend, name)]
    if missing:
        raise PluginError(f"The backend {source} has no {', '.join(missing)}; repair the plugin.")
    return backend


class CpuBackend:
    """Reduces and copies at once: memory is as fast as any proof that it will not change."""

    def reduce(self, tensor: torch.Tensor, *, exponents: bool) -> Reduction:
        """The `Statistics` themselves."""
        return statistics(tensor, exponents=exponents)

    def snapshot(self, tensor: torch.Tensor, allocate: Allocate, *, stride: int = 1) -> Snapshot:
        """Copy into memory from `allocate`, contiguous in logical order."""
        host = _room(tensor, allocate, stride=stride)
        _copy(host, _selected(tensor, stride))
        return _HostCopy(host.nbytes, host)

    def flush(self, reductions: Sequence[Reduction]) -> list[Statistics]:
        """Nothing is left to be done."""
        return list(cast("Sequence[Statistics]", reductions))


class CudaBackend:
    """Reduces and clones on the current stream; payloads go to the host on a side stream.

    Only `flush` and `Snapshot.host` wait. ROCm devices are of type `cuda` as well.
    """

    def __init__(self) -> None:
        self._sides: dict[torch.device, torch.cuda.Stream] = {}

    def reduce(self, tensor: torch.Tensor, *, exponents: bool) -> Reduction:
        """Queue the reduction; its vector stays on the device until `flush`."""
        with torch.cuda.device(tensor.device):
            vector = raw(tensor, exponents=exponents)
            return _Queued(vector, torch.cuda.current_stream())

    def snapshot(self, tensor: torch.Tensor, allocate: Allocate, *, stride: int = 1) -> Snapshot:
        """Clone on the device now; the clone is freed when its copy to the host is done."""
        host = _room(tensor, allocate, stride=stride)
        with torch.cuda.device(tensor.device):
            clone = torch.empty_like(host, device=tensor.device, pin_memory=False)
            _copy(clone, _selected(tensor, stride))
            side = self._side(tensor.device)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                _copy(host, clone)
            # Else the allocator would hand out the clone's memory before it has been read.
            clone.record_stream(side)
            return _DeviceCopy(host.nbytes, host, side.record_event())

    def flush(self, reductions: Sequence[Reduction]) -> list[Statistics]:
        """One copy and one synchronisation for each device."""
        queued = cast("Sequence[_Queued]", reductions)
        found: dict[int, Statistics] = {}
        for device in {one.vector.device for one in queued}:
            places = [at for at, one in enumerate(queued) if one.vector.device == device]
            with torch.cuda.device(device):
                for at in places:
                    queued[at].join(torch.cuda.current_stream())
                done = resolve([queued[at].vector for at in places])
            found |= zip(places, done, strict=True)
        return [found[at] for at in range(len(queued))]

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._sides[device]


_BUILT_IN: dict[str, Callable[[], Backend]] = {"cpu": CpuBackend, "cuda": CudaBackend}


def resolve(vectors: Sequence[torch.Tensor]) -> list[Statistics]:
    """Statistics from vectors of `stats.raw` on one device, by one copy to the host."""
    lengths = [vector.numel() for vector in vectors]
    return [finish(vector) for vector in torch.split(torch.cat(list(vectors)).cpu(), lengths)]


@dataclass(frozen=True, slots=True)
class _Queued:
    """A vector of `stats.raw` that `stream` is still working on."""

    vector: torch.Tensor
    stream: torch.cuda.Stream

    def join(self, reader: torch.cuda.Stream) -> None:
        """Let `reader` read the vector once it is there."""
        if reader != self.stream:
            reader.wait_stream(self.stream)
            self.vector.record_stream(reader)


@dataclass(slots=True)
class _HostCopy:
    nbytes: int
    tensor: torch.Tensor

    def host(self) -> torch.Tensor:
        return self.tensor


@dataclass(slots=True)
class _DeviceCopy:
    nbytes: int
    tensor: torch.Tensor
    done: torch.cuda.Event

    def host(self) -> torch.Tensor:
        self.done.synchronize()
        return self.tensor


def _room(tensor: torch.Tensor, allocate: Allocate, *, stride: int) -> torch.Tensor:
    """Host memory for the tensor, or for every `stride`-th element of it in one dimension."""
    shape = tuple(tensor.shape) if stride == 1 else (-(-tensor.numel() // stride),)
    nbytes = math.prod(shape) * tensor.element_size()
    if nbytes == 0:
        return torch.empty(shape, dtype=tensor.dtype, device="cpu")
    return allocate(nbytes)[:nbytes].view(tensor.dtype).view(shape)


def _selected(tensor: torch.Tensor, stride: int) -> torch.Tensor:
    """The tensor, or every `stride`-th element of it in logical order."""
    tensor = tensor.detach()
    if stride == 1:
        return tensor
    if tensor.is_contiguous():
        return tensor.view(-1)[::stride]
    places = torch.arange(0, tensor.numel(), stride, device=tensor.device)
    plain = tensor.resolve_conj().resolve_neg()
    return torch.take(_words(plain), places).view(tensor.dtype)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between tensors of one dtype and shape, conjugated and negated views resolved."""
    if not (source.is_conj() or source.is_neg()):
        target, source = _words(target), _words(source)
    target.copy_(source, non_blocking=True)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers of their size: every bit counts, and any dtype can be copied."""
    word = _WORDS.get(tensor.element_size())
    return tensor if word is None else tensor.view(word)
