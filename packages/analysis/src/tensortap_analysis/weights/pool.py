"""Workers that each compute with one thread: the numbers do not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

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

    Jobs are begun in their order. An error in one ends all; what is finished by then has been
    handed to `done`.
    """
    coming, count = iter(jobs), workers(parallel)
    with _one_thread(), ThreadPoolExecutor(count, initializer=_alone) as pool:
        waiting: dict[Future[Found], Job] = {}

        def submit(some: int) -> None:
            waiting.update((pool.submit(work, job), job) for job in islice(coming, some))

        submit(2 * count)
        try:
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(waiting.pop(future), future.result())
                submit(len(finished))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_thread() -> Iterator[None]:
    """One number of threads holds for the whole process: give it back as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _alone() -> None:
    torch.set_num_threads(1)
