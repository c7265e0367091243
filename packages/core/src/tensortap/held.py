"""`Holder`: captures that stay on their device until their graph has run or their step is over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from tensortap.arena import HostArena
from tensortap.backends import Backend, DeferredBackend, LazyBackend, Reduction, Snapshot
from tensortap.errors import CaptureError
from tensortap.listener import Listener
from tensortap.records import TensorRecord


@dataclass(slots=True)
class Item:
    """One tensor on its way under one or more names; without `snapshot` statistics only."""

    records: Sequence[TensorRecord]
    backend: Backend
    reduction: Reduction
    snapshot: Snapshot | None = None
    buffer: torch.Tensor | None = None
    """The piece of the arena its payload lies in, or takes the room of."""


@dataclass(frozen=True, slots=True)
class StepEnd:
    """All items of a step have been handed in before."""

    step: int


class Holder:
    """Items of one backend, from the hook until they can come to the host all at once.

    Those of a lazy backend wait for whoever runs the graph; nobody else should run any of it
    before, so it counts. Those of another deferred backend wait for the end of their step.
    """

    def __init__(
        self,
        backend: DeferredBackend,
        arena: HostArena,
        listener: Listener,
        *,
        put: Callable[..., None],
        may_wait: Callable[[], bool],
    ) -> None:
        """`put` hands items on; `may_wait` says whether to wait for room in the arena."""
        self.lazy = cast(LazyBackend, backend) if backend.lazy else None
        self._backend = backend
        self._arena, self._listener = arena, listener
        self._put, self._may_wait = put, may_wait
        self._lock = threading.RLock()
        self._items: list[Item] = []
        self._by_snapshot: dict[int, Item] = {}
        self._ended: list[int] = []
        self._nbytes = 0
        self._runs = 0

    def add(self, item: Item) -> None:
        """Hold an item; one that shares the payload of another joins it."""
        with self._lock:
            self._watch(item.records[0])
            snapshot = item.snapshot
            if snapshot is not None:
                known = self._by_snapshot.setdefault(id(snapshot), item)
                if known is not item:
                    known.records = [*known.records, *item.records]
                    return
                self._nbytes += snapshot.nbytes
            self._items.append(item)
            if self.lazy is None and self._nbytes > self._arena.limit:
                self._release()

    def _watch(self, record: TensorRecord) -> None:
        """Be told when the graph runs; say so if somebody ran a part of it before its end."""
        if self.lazy is None:
            return
        runs = self.lazy.runs()
        if not self._items:
            self.lazy.watch(self._ran)
        elif runs != self._runs:
            self._listener.read_early(f"{self._last()} and {record.name}")
        self._runs = runs

    def _last(self) -> str:
        return str(self._items[-1].records[-1].name)

    def end_step(self, step: int) -> bool:
        """All of `step` has been added; is its end handed on by the holder, behind its items?"""
        with self._lock:
            if not self._items:
                return False
            self._ended.append(step)
            if self.lazy is None:
                self._release()
            return True

    @property
    def overdue(self) -> bool:
        """Is a step over whose graph nobody has run?"""
        return bool(self._ended)

    @property
    def training(self) -> bool:
        """Is anything held of a forward that a backward may follow?"""
        calls = ("forward", "backward")
        return any(
            record.name.phase in calls and not record.at.eval
            for item in self._items
            for record in item.records
        )

    def run(self) -> bool:
        """Run the graph of what is held; the backend calls `_ran` then. False: it may not run."""
        return self.lazy is None or not self._items or self.lazy.run()

    def finish(self) -> None:
        """Nothing more will be added. Raises `CaptureError` where the graph may not be run."""
        if not self.run():
            raise CaptureError(
                "detached where the graph may not be run, as inside torch_xla.compile("
                "full_graph=True): what was captured in it is lost. Detach after it."
            )
        with self._lock:
            self._release()

    def _ran(self) -> None:
        """The graph has been run, by us or by the user: called in the thread that did."""
        try:
            with self._lock:
                if not self._items or self.lazy is None:
                    return
                runs, last = self.lazy.runs(), self._last()
                self._release()
                if runs > self._runs + 1:
                    self._listener.read_early(f"{last} and the end of the step")
        except Exception as failure:  # The listener reports it; the model must go on.
            self._listener.failed(failure)

    def _release(self) -> None:
        """Everything has its value: hand on what is wanted, in as few transfers as have room."""
        items, ended = self._items, self._ended
        self._items, self._by_snapshot, self._ended, self._nbytes = [], {}, [], 0
        for item in items:
            item.records = [one for one in item.records if self._listener.wants(one.at.step)]
        batch: list[Item] = []
        # Statistics need no room: all of them come with the first transfer.
        for item in sorted(items, key=lambda item: item.snapshot is not None):
            if item.records:
                self._make_room(item, batch)
                batch.append(item)
        self._collect(batch)
        self._put(*(StepEnd(step) for step in ended if self._listener.wants(step)))

    def _make_room(self, item: Item, batch: list[Item]) -> None:
        """Take room for a payload; if there is none, what has been prepared goes first."""
        nbytes = item.snapshot.nbytes if item.snapshot is not None else 0
        if nbytes == 0:
            return
        item.buffer = self._arena.take(nbytes, wait=lambda: False)
        if item.buffer is None:
            self._collect(batch)
            batch.clear()
            item.buffer = self._arena.take(nbytes, wait=self._may_wait)
        if item.buffer is None:  # The statistics are there, and cost no room.
            item.snapshot = None
            for record in item.records:
                self._listener.lost(record, "dropped: max_pending was full")
            item.records = [replace(one, values="stats", stride=1) for one in item.records]

    def _collect(self, batch: Sequence[Item]) -> None:
        if not batch:
            return
        snapshots = [item.snapshot for item in batch if item.snapshot is not None]
        done = self._backend.collect([item.reduction for item in batch], snapshots)
        for item, stats in zip(batch, done, strict=True):
            item.records = [replace(record, stats=stats) for record in item.records]
        self._put(*batch)
