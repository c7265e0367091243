"""Which step, microbatch and call a tensor belongs to.

Who ends a step, in order of precedence: `tap.step()`; the integration; the optimizers that own
the model's parameters, at once when together they cover all of them, else when the next forward
begins; without training, the beginning of the next outermost forward.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from tensortap.records import Coordinates
from tensortap.selection import Indices


def in_backward() -> bool:
    """Is this thread inside a backward pass? True for both kinds of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


@dataclass(slots=True, eq=False)
class Frame:
    """One outermost forward: a microbatch of a step."""

    step: int
    microbatch: int
    rank: int
    eval: bool
    selected: bool
    """Is anything captured in it? On lazy devices also where nothing of it will be recorded."""
    calls: Counter[str] = field(default_factory=Counter)
    order: list[tuple[str, int]] = field(default_factory=list)
    """Every call of a module in the forward, as it happened."""
    region: range | None = None
    """Where in `order` a region is being recomputed: from its first call to the region after."""
    cursor: int = -1

    def enter(self, site: str) -> Coordinates:
        """Coordinates of the next call of a site; a recomputed one gets its original's number."""
        recompute = in_backward()
        call = self._again(site) if recompute else self._next(site)
        return Coordinates(self.step, self.microbatch, call, self.rank, recompute, self.eval)

    def count(self, name: str) -> Coordinates:
        """Coordinates of something recorded by hand, wherever that happens."""
        call = self.calls[name]
        self.calls[name] += 1
        return Coordinates(self.step, self.microbatch, call, self.rank, False, self.eval)

    def whole(self, microbatch: int = 0) -> Coordinates:
        """Coordinates of what belongs to the step rather than to a call in it."""
        return Coordinates(self.step, microbatch, 0, self.rank)

    def _next(self, site: str) -> int:
        call = self.calls[site]
        self.calls[site] += 1
        self.order.append((site, call))
        return call

    def _again(self, site: str) -> int:
        """Which call is recomputed: regions come back in reverse, each in its own order.

        Coming back to the first module of a region, or to one that did not follow in the forward,
        begins the region before it.
        """
        region, follows = self.region, self.cursor + 1
        continues = (
            region is not None
            and follows in region
            and site == self.order[follows][0] != self.order[region.start][0]
        )
        if continues:
            self.cursor = follows
        else:
            self.region = self._region_before(
                site, len(self.order) if region is None else region.start
            )
            if self.region is None:
                return 0
            self.cursor = self.region.start
        return self.order[self.cursor][1]

    def _region_before(self, site: str, end: int) -> range | None:
        """From the last call of a site before a position to there; else from its last call at all.

        Only a second backward through the same forward comes back to a later call.
        """
        calls = [at for at, (called, _) in enumerate(self.order) if called == site]
        earlier = [at for at in calls if at < end]
        if earlier:
            return range(earlier[-1], end)
        return range(calls[-1], len(self.order)) if calls else None


class _Thread(threading.local):
    """What one thread is inside of."""

    def __init__(self) -> None:
        self.open: list[Hashable] = []
        self.frame: Frame | None = None


class StepClock:
    """Counts steps and microbatches of one tap; safe to call from several threads."""

    def __init__(
        self,
        *,
        rank: int,
        steps: Indices,
        begin: Callable[[Frame], None],
        end: Callable[[int, bool], None],
        every_step: bool = False,
    ) -> None:
        """`begin(frame)` opens each step; `end(step, selected)` closes it, exactly once each.

        `every_step`: capture in steps that are not selected as well.
        """
        self.step = 0
        self.counted = 0
        """Selected steps that ended, those of nothing but evaluation left out."""
        self.opened = 0
        """Forwards of containers seen so far: none means that no hook ever ran."""
        self.every_step = every_step
        self._rank = rank
        self._steps = steps
        self._begin, self._end = begin, end
        self._thread = _Thread()
        self._backward: dict[int, Frame] = {}
        self._lock = threading.RLock()
        self._last: Frame | None = None
        self._ran: Counter[tuple[Hashable, bool]] = Counter()
        self._roots: set[Hashable] = set()
        self.trained = self._stepped = self._manual = False
        self._held = 0

    def open(self, module: nn.Module, *, root: bool, training: bool) -> Frame | None:
        """A container module begins; the outermost one begins a microbatch.

        A root that begins inside itself was left by an interrupt, of which hooks are not told.
        """
        name = f"module {id(module)}"
        if in_backward():
            self.frame().enter(name)
            return None
        stack = self._thread.open
        if root and module in stack:
            stack.clear()
        if not stack:
            self._thread.frame = self._microbatch(module, training)
            self.opened += 1
        stack.append(module)
        self.frame().enter(name)
        return self._thread.frame

    def close(self, module: nn.Module) -> Frame | None:
        """A container module ended, perhaps with an exception below it; its frame if outermost."""
        stack = self._thread.open
        if module not in stack:
            return None
        while stack.pop() is not module:
            pass
        return None if stack else self._thread.frame

    def frame(self) -> Frame:
        """The microbatch that code running now belongs to."""
        thread = self._thread
        if in_backward():
            found = self._of_backward() or self._last
        else:
            found = thread.frame if thread.open else self._last
        return found or self._microbatch(None, False)

    def _of_backward(self) -> Frame | None:
        """The frame of this backward pass, or of the one it runs in (reentrant checkpointing)."""
        with self._lock:
            passes = self._backward
            task = torch._C._current_graph_task_id()
            return passes.get(task) or next(reversed(passes.values()), None)

    def backward_reached(self, frame: Frame) -> None:
        """A gradient of `frame` arrived: until this backward pass ends, it belongs to it."""
        task = torch._C._current_graph_task_id()
        with self._lock:
            known, outermost = task in self._backward, not self._backward
            self._backward[task] = frame
        if outermost:
            frame.region = None
        if not known:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._passed(task))

    def _passed(self, task: int) -> None:
        with self._lock:
            self._backward.pop(task, None)

    def _microbatch(self, root: Hashable, training: bool) -> Frame:
        with self._lock:
            evaluation = not training and self.trained and not self._manual
            begins = training and not self.trained and self._inferred()
            self.trained |= training
            if not self._manual and (
                self._stepped or begins or self._next_inference(root, training)
            ):
                self._finish()
            first = not self._ran
            frame = Frame(
                self.step,
                self._ran[root, evaluation],
                self._rank,
                evaluation,
                self.every_step or self.step in self._steps,
            )
            self._ran[root, evaluation] += 1
            self._last = frame
            if first:
                self._begin(frame)
            return frame

    def _inferred(self) -> bool:
        """Did the model run in this step, outside `one_step`?"""
        return not self._held and any(root is not None for root, _ in self._ran)

    def _next_inference(self, root: Hashable, training: bool) -> bool:
        """Outside training and `one_step`, a root that runs again begins a new step."""
        return not (training or self.trained or self._held) and self._ran[root, False] > 0

    def optimizers_stepped(self, all_parameters: bool) -> None:
        """Optimizers that own parameters of the model have stepped, or skipped an overflow."""
        with self._lock:
            self.trained = True
            if self._manual:
                return
            self._stepped = True
            if all_parameters:
                self._finish()

    def end_step(self) -> None:
        """The integration's trainer finished a step."""
        with self._lock:
            if not self._manual:
                self._finish()

    def manual_step(self) -> None:
        """The user finished a step; from now on only the user does."""
        with self._lock:
            empty = not self._ran and not self._manual and self.step > 0
            self._manual = True
            if not empty:
                self._finish(even_empty=True)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Everything inside is one step, unless a training step is under way."""
        with self._lock:
            if not (self.trained or self._manual or self._held):
                self._finish()
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1
                if not (self.trained or self._manual or self._held):
                    self._finish()

    def finish(self) -> None:
        """Detach: the step under way ends here."""
        with self._lock:
            self._finish()

    def _finish(self, *, even_empty: bool = False) -> None:
        self._stepped = False
        if not self._ran and not even_empty:
            return
        if any(not evaluation for _, evaluation in self._ran):
            self.counted += self.step in self._steps
        self._ran.clear()
        ended, self.step = self.step, self.step + 1
        self._end(ended, self.every_step or ended in self._steps)
