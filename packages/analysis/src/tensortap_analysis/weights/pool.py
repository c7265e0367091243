"""Workers that each compute with one thread: the numbers do not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import torch

from tensortap_analysis.weights.threads import OneThread

Job = TypeVar("Job")
Found = TypeVar("Found")


def workers(parallel: bool | int) -> int:
    """How many workers: 1 for `False`, one a core for `True` or 0."""
    if parallel is False:
        return 1
    if parallel is True or parallel == 0:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores()
    return max(int(parallel), 1)


def _cores() -> int:
    return os.cpu_count() or 1


def in_workers(
    jobs: Iterable[Job],
    work: Callable[[Job], Found],
    *,
    parallel: bool | int,
    done: Callable[[Job, Found], None],
) -> None:
    """Call `work` for each job; `done` is called in this thread, as each is finished.

    Jobs are begun in their order. An error in one ends all, after what was finished beside it has
    been handed to `done`.
    """
    coming, count = iter(jobs), workers(parallel)
    with _TORCH.used(), ThreadPoolExecutor(count, initializer=_alone) as pool:
        waiting: dict[Future[Found], Job] = {}

        def submit(some: int) -> None:
            waiting.update((pool.submit(work, job), job) for job in islice(coming, some))

        submit(2 * count)
        try:
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in sorted(finished, key=_failed):
                    done(waiting.pop(future), future.result())
                submit(len(finished))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _failed(future: Future[Found]) -> bool:
    return future.exception() is not None


def _alone() -> None:
    torch.set_num_threads(1)


def _get() -> int:
    with ThreadPoolExecutor(1) as other:
        return other.submit(torch.get_num_threads).result()


def _put(count: int) -> None:
    """From a thread of its own: part of what torch sets is that of the calling thread, which may
    not be the one to set it back.
    """
    with ThreadPoolExecutor(1) as other:
        other.submit(torch.set_num_threads, count).result()


_TORCH = OneThread(_get, _put)
