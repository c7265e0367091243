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
    calls: Counter[str] = field(default_factory=Counter)
    recomputed: Counter[str] = field(default_factory=Counter)

    def enter(self, site: str) -> Coordinates:
        """Coordinates of the next call of a site; a recomputed one gets its original's number.

        Backward visits calls in reverse, so the first call recomputed is the last one made.
        """
        if not in_backward():
            call, recompute = self.calls[site], False
            self.calls[site] += 1
        else:
            call = max(self.calls[site] - 1 - self.recomputed[site], 0)
            recompute = True
            self.recomputed[site] += 1
        return Coordinates(self.step, self.microbatch, call, self.rank, recompute, self.eval)


class _Thread(threading.local):
    """What one thread is inside of; autograd's device threads have their own."""

    def __init__(self) -> None:
        self.open: list[Hashable] = []
        self.frame: Frame | None = None
        self.backward: Frame | None = None


class StepClock:
    """Counts steps and microbatches of one tap; safe to call from several threads."""

    def __init__(
        self,
        *,
        rank: int,
        steps: Indices,
        begin: Callable[[Frame], None],
        end: Callable[[int, bool], None],
    ) -> None:
        """`begin(frame)` opens each step; `end(step, selected)` closes it, exactly once each."""
        self.step = 0
        self.began = 0
        """Microbatches seen so far."""
        self._rank = rank
        self._steps = steps
        self._begin, self._end = begin, end
        self._thread = _Thread()
        self._lock = threading.RLock()
        self._last: Frame | None = None
        self._ran: Counter[tuple[Hashable, bool]] = Counter()
        self._roots: set[Hashable] = set()
        self.trained = self._stepped = self._manual = False
        self._held = 0

    def open(self, module: Hashable, *, training: bool) -> None:
        """A container module begins; the outermost one begins a microbatch."""
        if in_backward():
            return
        if not self._thread.open:
            self._thread.frame = self._microbatch(module, training)
        self._thread.open.append(module)

    def close(self, module: Hashable) -> None:
        """A container module ended, perhaps with an exception below it."""
        stack = self._thread.open
        if module in stack:
            while stack.pop() != module:
                pass

    def frame(self) -> Frame:
        """The microbatch that code running now belongs to."""
        thread = self._thread
        if in_backward():
            found = thread.backward or self._last
        else:
            found = thread.frame if thread.open else self._last
        return found or self._microbatch(None, torch.is_grad_enabled())

    def backward_reached(self, frame: Frame) -> None:
        """A gradient of `frame` arrived: what this thread recomputes next belongs to it."""
        self._thread.backward = frame

    def _microbatch(self, root: Hashable, training: bool) -> Frame:
        with self._lock:
            evaluation = not training and self.trained and not self._manual
            self.trained |= training
            if not self._manual and (self._stepped or self._next_inference(root, training)):
                self._finish()
            first = not self._ran
            frame = Frame(
                self.step,
                self._ran[root, evaluation],
                self._rank,
                evaluation,
                self.step in self._steps,
            )
            self._ran[root, evaluation] += 1
            self._last = frame
            self.began += 1
            if first:
                self._begin(frame)
            return frame

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
        self._ran.clear()
        ended, self.step = self.step, self.step + 1
        self._end(ended, ended in self._steps)
