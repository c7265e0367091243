"""The backend for lazy XLA tensors: torch_xla, and torch-neuronx up to its version for torch 2.9.

A hook only adds to the graph: the statistics of a tensor, and a clone where its values are
wanted. Whoever runs the graph runs that with it (the user's `torch_xla.sync()`; for a forward
without gradients the tap, at its end), and one transfer brings everything to the host.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import cast

import torch

from tensortap.backends import Allocate, Reduction, Snapshot
from tensortap.records import Statistics
from tensortap_neuron import reduction
from tensortap_neuron.pending import Clone, Pending, Vector, contiguous_clone, still_waiting
from tensortap_neuron.xla_runtime import Runtime


class XlaBackend:
    """One for all XLA tensors of a process; implements `tensortap.backends.LazyBackend`."""

    lazy = True

    def __init__(self, runtime: Runtime | None = None, *, wide: torch.dtype | None = None) -> None:
        """`wide` is the type statistics are computed in; by default what the device has."""
        self._runtime = runtime or Runtime()
        self._wide = wide or (torch.float64 if self._runtime.has_float64() else torch.float32)
        self._powers: dict[torch.device, torch.Tensor] = {}
        self._known: dict[Hashable, Pending] = {}
        self._watchers: list[Callable[[], None]] = []
        self._told = False
        self._lock = threading.RLock()

    def place(self) -> tuple[int, int]:
        """Which process this is, of those of `torch_xla.launch` or of the hosts of an SPMD job."""
        return self._runtime.place()

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
        found = self._once(("values", stride), tensor, lambda: self._clone(tensor, stride))
        return cast(Clone, found)

    def flush(self, reductions: Sequence[Reduction]) -> list[Statistics]:
        """Run the graph and fetch statistics; for callers that hold nothing else."""
        self.run()
        return self.collect(reductions, [])

    def collect(
        self, reductions: Sequence[Reduction], snapshots: Sequence[Snapshot]
    ) -> list[Statistics]:
        """Fetch everything by one transfer; runs nothing once the graph has run."""
        vectors = cast("Sequence[Vector]", reductions)
        queued = still_waiting(cast("list[Pending]", [*vectors, *snapshots]))
        fetched = self._runtime.fetch([tensor for _, tensor in queued])
        for (one, _), value in zip(queued, fetched, strict=True):
            one.arrived(value)
        return [vector.statistics() for vector in vectors]

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

    def _once(self, kind: Hashable, tensor: torch.Tensor, make: Callable[[], Pending]) -> Pending:
        """What was made of the same value in the graph under way, or a new one."""
        with self._lock:
            known = self._known.get(self._key(kind, tensor))
            if known is None:
                known = make()
                # Asked again: a tensor that was not on the device yet has just been uploaded.
                self._known[self._key(kind, tensor)] = known
            return known

    def _key(self, kind: Hashable, tensor: torch.Tensor) -> Hashable:
        identity = self._runtime.identity(tensor)
        # A new object equals nothing else: a value that nobody can tell is never shared.
        return kind, object() if identity is None else identity, tensor.dtype, tuple(tensor.shape)

    def _vector(self, tensor: torch.Tensor, *, exponents: bool) -> Vector:
        layout = reduction.layout(tensor, exponents=exponents, wide=self._wide)
        if tensor.numel() == 0:
            return Vector(layout, None)
        powers = self._powers_on(tensor.device) if exponents else None
        return Vector(layout, self._runtime.whole(reduction.vector(tensor, layout, powers)))

    def _powers_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._powers:
            self._powers[device] = reduction.powers_of_two(self._wide, device)
        return self._powers[device]

    def _clone(self, tensor: torch.Tensor, stride: int) -> Clone:
        clone = contiguous_clone(tensor, stride)
        waiting = self._runtime.whole(clone)
        return Clone(clone.nbytes, clone.shape, waiting, lambda one: self.collect([], [one]))
