"""The backend for lazy XLA tensors: torch_xla, and torch-neuronx up to its version for torch 2.9.

A hook only adds to the graph: the statistics of a tensor, and a clone where its values are
wanted. Whoever runs the graph runs that with it (the user's `torch_xla.sync()`; for a forward
without gradients the tap, at its end), and one transfer brings everything to the host.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from tensortap.backends import Allocate, Reduction, Snapshot
from tensortap.records import Statistics
from tensortap_neuron import reduction
from tensortap_neuron.reduction import Layout
from tensortap_neuron.xla_runtime import Runtime


class XlaBackend:
    """One for all XLA tensors of a process; implements `tensortap.backends.LazyBackend`."""

    lazy = True

    def __init__(self, runtime: Runtime | None = None, *, wide: torch.dtype | None = None) -> None:
        """`wide` is the type statistics are computed in; by default what the device has."""
        self._runtime = runtime or Runtime()
        self._wide = wide or (torch.float64 if self._runtime.has_float64() else torch.float32)
        self._powers: dict[torch.device, torch.Tensor] = {}
        self._known: dict[Hashable, _Vector | _Clone] = {}
        self._watchers: list[Callable[[], None]] = []
        self._told = False
        self._lock = threading.RLock()

    def refuse(self) -> str | None:
        """Graph extraction runs stubs: every value would be a zero that looks like a result."""
        if os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY", "0") in ("", "0"):
            return None
        return (
            "NEURON_EXTRACT_GRAPHS_ONLY is set (neuron_parallel_compile sets it): graphs are only "
            "collected, and every output is zero. Attach in the run that follows."
        )

    def reduce(self, tensor: torch.Tensor, *, exponents: bool) -> Reduction:
        """Add the statistics to the graph."""
        return self._once(
            ("statistics", exponents), tensor, lambda: self._vector(tensor, exponents=exponents)
        )

    def snapshot(self, tensor: torch.Tensor, allocate: Allocate, *, stride: int = 1) -> Snapshot:
        """Add a clone to the graph: a view, even a detached one, would follow in-place ops."""
        return cast(
            Snapshot, self._once(("values", stride), tensor, lambda: self._clone(tensor, stride))
        )

    def flush(self, reductions: Sequence[Reduction]) -> list[Statistics]:
        """Run the graph and fetch statistics; for callers that hold nothing else."""
        self.run()
        return self.collect(reductions, [])

    def collect(
        self, reductions: Sequence[Reduction], snapshots: Sequence[Snapshot]
    ) -> list[Statistics]:
        """Fetch everything by one transfer; runs nothing once the graph has run."""
        both = cast("list[_Vector | _Clone]", [*reductions, *snapshots])
        unique = {id(one): one for one in both if one.lazy is not None}.values()
        fetched = self._runtime.fetch([cast(torch.Tensor, one.lazy) for one in unique])
        for one, value in zip(unique, fetched, strict=True):
            one.arrived(value)
        return [one.statistics() for one in cast("Sequence[_Vector]", reductions)]

    def watch(self, ran: Callable[[], None]) -> None:
        """Call `ran` when the graph under way has run, by `run` or by the user."""
        with self._lock:
            self._watchers.append(ran)
            if not self._told:
                self._told = True
                self._runtime.after_sync(self._synced)

    def run(self) -> bool:
        """Run the graph of all live tensors, unless the user has forbidden that."""
        if not self._runtime.may_run():
            return False
        self._runtime.run()
        self._ran()
        return True

    def runs(self) -> int:
        """How many graphs this process has run."""
        return self._runtime.runs()

    def _synced(self) -> None:
        with self._lock:
            self._told = False
        self._ran()

    def _ran(self) -> None:
        with self._lock:
            self._known = {}
            watchers, self._watchers = self._watchers, []
        for ran in watchers:
            ran()

    def _once(
        self,
        kind: Hashable,
        tensor: torch.Tensor,
        make: Callable[[], _Vector | _Clone],
    ) -> _Vector | _Clone:
        """What was made of the same value in the graph under way, or a new one."""
        identity = self._runtime.identity(tensor)
        if identity is None:
            return make()
        key = (kind, identity, tensor.dtype, tuple(tensor.shape))
        with self._lock:
            if key not in self._known:
                self._known[key] = make()
            return self._known[key]

    def _vector(self, tensor: torch.Tensor, *, exponents: bool) -> _Vector:
        layout = reduction.layout(tensor, exponents=exponents, wide=self._wide)
        if tensor.numel() == 0:
            return _Vector(layout, None, [])
        powers = self._powers_on(tensor.device) if exponents else None
        vector = reduction.vector(tensor, layout, powers)
        return _Vector(layout, self._runtime.whole(vector))

    def _powers_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._powers:
            self._powers[device] = reduction.powers_of_two(self._wide, device)
        return self._powers[device]

    def _clone(self, tensor: torch.Tensor, stride: int) -> _Clone:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        wanted = tensor if stride == 1 else tensor.reshape(-1)[::stride]
        clone = wanted.clone(memory_format=torch.contiguous_format)
        return _Clone(wanted.nbytes, self, wanted.shape, self._runtime.whole(clone))


@dataclass(slots=True)
class _Vector:
    """Statistics on their way: in the graph first, on the host then."""

    layout: Layout
    lazy: torch.Tensor | None
    numbers: list[float] | None = None

    def arrived(self, value: torch.Tensor) -> None:
        """It has been fetched."""
        self.lazy, self.numbers = None, value.reshape(-1).tolist()

    def statistics(self) -> Statistics:
        """Of a vector that has arrived."""
        assert self.numbers is not None
        return reduction.statistics(self.numbers, self.layout)


@dataclass(slots=True)
class _Clone:
    """Values on their way."""

    nbytes: int
    backend: XlaBackend
    shape: torch.Size
    lazy: torch.Tensor | None
    value: torch.Tensor | None = None

    def arrived(self, value: torch.Tensor) -> None:
        """It has been fetched."""
        self.lazy, self.value = None, value.reshape(self.shape).contiguous()

    def host(self) -> torch.Tensor:
        """The values; fetched now if nobody has collected them."""
        if self.value is None:
            self.backend.collect([], [self])
        assert self.value is not None
        return self.value
