"""The loop of a scan: weights are read, measured and let go, by one or several workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
import xxhash

from tensortap_analysis.weights.measures import measure
from tensortap_analysis.weights.options import Options
from tensortap_analysis.weights.stacks import worst
from tensortap_analysis.weights.weight import Weight

Measured = dict[str, Any]
"""`{"digest": …, "stats": {method: {metric: value}}}` of one weight."""
_OF_VECTORS = ("sparsity", "norms")


def methods_of(weight: Weight, methods: Sequence[str]) -> tuple[str, ...]:
    """Those of `methods` that a weight of this kind has."""
    return tuple(name for name in methods if weight.kind != "vector" or name in _OF_VECTORS)


def measured(weight: Weight, methods: Sequence[str], options: Options) -> Measured:
    """All metrics of one weight, and a digest of its values; called in a worker."""
    digest, parts = xxhash.xxh3_128(), []
    for matrix in weight.matrices():
        digest.update(_bytes(matrix))
        parts.append(measure(matrix, weight.dtype, methods_of(weight, methods), options))
    if weight.kind != "experts":
        return {"digest": digest.hexdigest(), "stats": parts[0]}
    stats = {name: worst([part[name] for part in parts]) for name in methods}
    return {"digest": digest.hexdigest(), "stats": stats}


def _bytes(matrix: torch.Tensor) -> Any:
    return matrix.view(torch.uint8).numpy() if matrix.numel() else b""


def workers(parallel: bool | int) -> int:
    """How many workers: 1 for `False`, one a core for `True` or 0."""
    if parallel is False:
        return 1
    if parallel is True or parallel == 0:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores()
    return max(int(parallel), 1)


def _cores() -> int:
    return os.cpu_count() or 1


def run(
    weights: Sequence[Weight],
    methods: Sequence[str],
    options: Options,
    *,
    parallel: bool | int,
    done: Callable[[Weight, Measured], None],
) -> None:
    """Measure `weights`, largest first; `done` is called in this thread, as each is finished.

    The same numbers whatever `parallel` is: every worker computes with one thread of its own.
    An error in one ends the scan; what is finished by then has been handed to `done`.
    """
    largest_first = iter(sorted(weights, key=lambda weight: -weight.nbytes))
    with _one_thread(), ThreadPoolExecutor(workers(parallel), initializer=_alone) as pool:
        waiting: dict[Future[Measured], Weight] = {}
        _submit(pool, waiting, largest_first, methods, options, 2 * workers(parallel))
        try:
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(waiting.pop(future), future.result())
                _submit(pool, waiting, largest_first, methods, options, len(finished))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _submit(
    pool: ThreadPoolExecutor,
    waiting: dict[Future[Measured], Weight],
    weights: Iterator[Weight],
    methods: Sequence[str],
    options: Options,
    count: int,
) -> None:
    for _, weight in zip(range(count), weights, strict=False):
        waiting[pool.submit(measured, weight, methods, options)] = weight


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


def same_values(weights: Sequence[Weight], found: Mapping[str, Measured]) -> dict[str, str]:
    """Names of matrices that have the very values of an earlier one, and that one's name.

    Matrices that are constant (all zero: the second half of a fresh LoRA) are no copies.
    """
    first: dict[tuple[object, ...], str] = {}
    copies: dict[str, str] = {}
    for weight in weights:
        if weight.kind == "vector" or not weight.numel:
            continue
        key = (weight.shape, weight.dtype, found[weight.name]["digest"])
        same = first.setdefault(key, weight.name)
        if same != weight.name and not _constant(weight):
            copies[weight.name] = same
    return copies


def _constant(weight: Weight) -> bool:
    return all(bool((matrix == matrix[0, 0]).all()) for matrix in weight.matrices())
