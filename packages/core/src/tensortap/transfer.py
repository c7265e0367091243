"""Device -> host -> sink: bounded, asynchronous, accounted for.

Hooks hand in records; one thread waits for their copies and writes them to the sink in order.
`max_pending` bounds the host memory of payloads in flight. Captures of deferred and lazy
backends are held first, until all of a step can come to the host at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch

from tensortap.arena import HostArena, rounded
from tensortap.backends import Backend, DeferredBackend, Reduction
from tensortap.config import OnFull
from tensortap.errors import CaptureError
from tensortap.held import Holder, Item, StepEnd
from tensortap.listener import Listener
from tensortap.records import TensorRecord
from tensortap.sinks import TensorSink

_STATISTICS_AT_ONCE = 4096
"""Unresolved statistics held before they are flushed inside a very long step."""

_MOST_WAITING = 1 << 16
"""Records waiting for a sink that is slower than the model; some 60 MiB without payloads."""


class Transfer:
    """Owns the sink after `open`: only the transfer thread writes to it."""

    def __init__(
        self, sink: TensorSink, listener: Listener, *, max_pending: int, on_full: OnFull
    ) -> None:
        self.arena = HostArena(max_pending)
        self.failure: BaseException | None = None
        self._sink = sink
        self._on_full = on_full
        self._listener = listener
        self._statistics: list[Item] = []
        self._holders: dict[int, Holder] = {}
        self._queue: deque[Item | StepEnd | None] = deque()
        self._ready = threading.Condition()
        self._busy = False
        self._hand_in = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="tensortap-transfer", daemon=True)
        self._thread.start()

    def statistics(
        self, records: Sequence[TensorRecord], backend: Backend, reduction: Reduction
    ) -> None:
        """Hand in a tensor without payload; it is written at the end of its step."""
        holder = self._holder(backend)
        if holder is not None:
            holder.add(Item(records, backend, reduction))
            return
        with self._hand_in:
            self._statistics.append(Item(records, backend, reduction))
            if len(self._statistics) >= _STATISTICS_AT_ONCE:
                self._resolve()

    def payload(
        self,
        records: Sequence[TensorRecord],
        backend: Backend,
        reduction: Reduction,
        tensor: torch.Tensor,
    ) -> str | None:
        """Copy `tensor` and hand it in; returns why that was impossible, or `None`.

        `tensor` itself may change as soon as this returns.
        """
        stride = records[0].stride
        if rounded(-(-tensor.numel() // stride) * tensor.element_size()) > self.arena.limit:
            return self._borrow(Item(records, backend, reduction), tensor)
        holder = self._holder(backend)
        if holder is not None:
            snapshot = backend.snapshot(tensor, _no_room, stride=stride)
            holder.add(Item(records, backend, reduction, snapshot))
            return None
        taken: list[torch.Tensor] = []

        def allocate(nbytes: int) -> torch.Tensor:
            buffer = self.arena.take(nbytes, wait=self._may_wait)
            if buffer is None:
                raise _Full
            taken.append(buffer)
            return buffer

        try:
            snapshot = backend.snapshot(tensor, allocate, stride=stride)
        except _Full:
            return "sink error" if self.failure else "dropped: max_pending was full"
        self._put(Item(records, backend, reduction, snapshot, taken[0] if taken else None))
        return None

    def _borrow(self, item: Item, tensor: torch.Tensor) -> str | None:
        """A tensor larger than the whole budget is written from its own memory, in the hook."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or item.records[0].stride > 1:
            return f"dropped: {tensor.nbytes} bytes are more than max_pending; raise it"
        item.snapshot = _Borrowed(tensor)
        self._put(item)
        self.drain()
        return None

    def _holder(self, backend: Backend) -> Holder | None:
        """Who holds what the backend captures; `None` where nothing is deferred."""
        if not hasattr(backend, "lazy"):
            return None
        if id(backend) not in self._holders:
            self._holders[id(backend)] = Holder(
                cast(DeferredBackend, backend),
                self.arena,
                self._listener,
                put=self._put,
                may_wait=self._may_wait,
            )
        return self._holders[id(backend)]

    def end_inference(self, *, trained: bool) -> None:
        """A forward without gradients is over: run what lazy backends hold of it.

        What the caller reads next would run the forward without the captures. In a model that
        is `trained`, a training step may be under way: its graph is left to its own end.
        """
        for holder in self._holders.values():
            if not (trained and holder.training):
                holder.run()

    def run_overdue(self) -> None:
        """Run what is left of steps that are over: it must not grow into the next one."""
        for holder in self._holders.values():
            if holder.overdue:
                holder.run()

    def _may_wait(self) -> bool:
        return self._on_full == "wait" and self.failure is None and self._thread.is_alive()

    def end_step(self, step: int) -> None:
        """Resolve the statistics of the step in one batch and hand them in."""
        with self._hand_in:
            self._resolve()
        held = [holder.end_step(step) for holder in self._holders.values()]
        if not any(held) and self._listener.wants(step):
            self._put(StepEnd(step))

    def _resolve(self) -> None:
        items, self._statistics = self._statistics, []
        for backend in {id(item.backend): item.backend for item in items}.values():
            same = [item for item in items if item.backend is backend]
            done = backend.flush([item.reduction for item in same])
            for item, stats in zip(same, done, strict=True):
                item.records = [replace(record, stats=stats) for record in item.records]
        self._put(*items)

    def _put(self, *items: Item | StepEnd | None) -> None:
        with self._ready:
            while len(self._queue) > _MOST_WAITING and self._may_wait():
                self._ready.wait(timeout=0.5)
            self._queue.extend(items)
            self._ready.notify_all()

    def drain(self) -> None:
        """Wait until everything handed in has reached the sink, or the capture has failed."""
        with self._ready:
            while (self._queue or self._busy) and self._thread.is_alive():
                self._ready.wait(timeout=0.5)

    def close(self) -> None:
        """Write what is left and end the thread; the sink is not closed here."""
        try:
            with self._hand_in:
                self._resolve()
            for holder in self._holders.values():
                holder.finish()
        finally:
            self._put(None)
            self._thread.join()
            self.arena.clear()

    def _run(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._queue)
                item = self._queue.popleft()
                self._busy = True
            if item is not None and self.failure is None:
                self._try(item)
            if isinstance(item, Item) and item.buffer is not None:
                self.arena.give(item.buffer)
            with self._ready:
                self._busy = False
                self._ready.notify_all()
            if item is None:
                return

    def _try(self, item: Item | StepEnd) -> None:
        """A sink may raise anything: the training run must not die of it, but must be told."""
        try:
            if isinstance(item, StepEnd):
                self._sink.end_step(item.step)
            else:
                self._write(item)
        except BaseException as failure:
            self.failure = failure
            self._listener.stopped(failure)
            self.arena.wake()

    def _write(self, item: Item) -> None:
        payload = item.snapshot.host() if item.snapshot else None
        if item.records[0].stats is None:
            [stats] = item.backend.flush([item.reduction])
            item.records = [replace(record, stats=stats) for record in item.records]
        for record in item.records:
            self._sink.write(record, payload)
            self._listener.written(record)


def _no_room(nbytes: int) -> torch.Tensor:
    """Deferred backends copy within the device; host memory is found when it is needed."""
    raise AssertionError("a deferred backend asked for host memory in a hook")


class _Full(CaptureError):
    """The pool is full and nobody may wait."""


class _Borrowed:
    """A snapshot that is the tensor itself; only while its hook is blocked."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self.nbytes = tensor.nbytes

    def host(self) -> torch.Tensor:
        return self._tensor
