"""The loop of a scan: weights are read, measured and let go, by one or several workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import xxhash

from tensortap_analysis.weights.measures import measure
from tensortap_analysis.weights.options import Options
from tensortap_analysis.weights.pool import in_workers
from tensortap_analysis.weights.stacks import worst
from tensortap_analysis.weights.weight import Weight

Measured = dict[str, Any]
"""`{"digest": …, "stats": {method: {metric: value}}}` of one weight."""
_OF_VECTORS = ("sparsity", "norms")


def methods_of(weight: Weight, methods: Sequence[str]) -> tuple[str, ...]:
    """Those of `methods` that a weight of this kind has."""
    return tuple(name for name in methods if weight.has_spectrum or name in _OF_VECTORS)


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
    largest_first = sorted(weights, key=lambda weight: -weight.nbytes)

    def work(weight: Weight) -> Measured:
        return measured(weight, methods, options)

    in_workers(largest_first, work, parallel=parallel, done=done)


def same_values(weights: Sequence[Weight], found: Mapping[str, Measured]) -> dict[str, str]:
    """Names of matrices that have the very values of an earlier one, and that one's name.

    Matrices that are constant (all zero: the second half of a fresh LoRA) are no copies, and
    neither are those with NaN: they have diverged alike.
    """
    first: dict[tuple[object, ...], str] = {}
    copies: dict[str, str] = {}
    for weight in weights:
        if not weight.has_spectrum or not weight.numel:
            continue
        key = (weight.shape, weight.dtype, found[weight.name]["digest"])
        same = first.setdefault(key, weight.name)
        if same != weight.name and _distinctive(weight):
            copies[weight.name] = same
    return copies


def _distinctive(weight: Weight) -> bool:
    """Are its values such that another matrix does not have them by chance?"""
    varied = False
    for matrix in weight.matrices():
        if bool((matrix != matrix).any()):
            return False
        varied = varied or bool((matrix != matrix[0, 0]).any())
    return varied
