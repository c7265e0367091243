"""How many tensors are compared at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")

_LARGE = 1 << 18
"""Bytes of a tensor whose comparison is mostly compiled code, during which others can go on."""
_MOST = 4
"""Tensors in memory at a time, each with its blocks."""


@dataclass(frozen=True, slots=True)
class Crew:
    """Threads that compare a tensor each, and on how many of torch's the kernel may run then."""

    workers: int
    threads: int

    @classmethod
    def for_tensors(cls, count: int, nbytes: float) -> Crew:
        """For so many tensors of this size; of small ones Python's own work would only collide."""
        threads = torch.get_num_threads()
        workers = min(threads, count, _MOST) if nbytes >= _LARGE else 1
        return cls(max(workers, 1), max(threads // max(workers, 1), 1))

    def each(self, work: Callable[[_T], _R], items: Sequence[_T]) -> Iterator[_R]:
        """The results in the order of the items; when it is left early, no further work begins."""
        if self.workers == 1:
            yield from map(work, items)
            return
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="tensortap-compare")
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


ALONE = Crew(1, 1)
"""One tensor after the other."""
