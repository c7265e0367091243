"""The error that rounding alone would make, where no second reference tells: an estimate.

One rounding to nearest leaves a relative root-mean-square error of 0.21 eps in values that spread
over their octaves. A layer makes many of them, which add up like independent errors, and sharpens
some (softmax, attention gradients), so that the square of the error grows by a constant for each
layer. The constant was fitted to bfloat16 against float32 runs of a small Llama, forward and
backward: it lies above every tensor of them, and 2 to 8 times above most. In float32 and float64
sums are rounded as well, in another order by every kernel, which narrower dtypes are spared; the
factor was fitted to one Llama in two frameworks and over two processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from tensortap_analysis.captured.words import layer_of
from tensortap_analysis.pairs.pair import Pair

_ONE = 0.21
"""Relative RMS error of one rounding, in units of eps."""
_SUMMED = 4.0
"""How much more the sums of a dtype lose that are accumulated in itself."""
_PER_LAYER = 128
"""Roundings that a layer is taken to make one after the other."""


def expected(pairs: Iterable[Pair]) -> Iterator[float]:
    """The relative error that rounding explains, for each pair; pairs in execution order.

    What was rounded coarsely stays so: the coarsest floating dtype seen so far counts, in which
    weights and activations may be while losses and softmaxes are float32. 0 for integers.
    """
    pairs = list(pairs)
    numbers = [layer_of(_module(pair)) for pair in pairs]
    depth = 1 + max((number for number in numbers if number is not None), default=0)
    coarsest = 0.0
    for pair, number in zip(pairs, numbers, strict=True):
        steps = [eps(pair.ref.dtype), eps(pair.other.dtype)]
        if not all(steps):  # indices and masks are not rounded
            yield 0.0
            continue
        coarsest = max(coarsest, *map(_in_sums, steps))
        yield _ONE * coarsest * math.sqrt(1 + _PER_LAYER * _passed(pair, number, depth))


def once(dtype: str) -> float:
    """The relative RMS error that one rounding to this dtype leaves; 0 where nothing is rounded."""
    return _ONE * eps(dtype)


def _in_sums(step: float) -> float:
    return step * _SUMMED if step <= torch.finfo(torch.float32).eps else step


def eps(dtype: str) -> float:
    """Distance from 1 to the next larger number of a floating dtype; 0 for any other."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not (kind.is_floating_point or kind.is_complex):
        return 0.0
    try:
        return torch.finfo(kind).eps
    except (TypeError, NotImplementedError):  # packed 4-bit floats have one bit of mantissa
        return 0.5


def largest(dtype: str) -> float:
    """The largest finite number of a floating dtype; infinite for any other."""
    return float(torch.finfo(getattr(torch, dtype)).max) if eps(dtype) not in (0, 0.5) else math.inf


def lowest_of_mask(dtype: str) -> float:
    """The number that only masks hold: the lowest there is; narrow formats use all of theirs."""
    wide = dtype in ("bfloat16", "float16", "float32", "float64")
    return -largest(dtype) if wide else -math.inf


def is_mask(name: str, dtype: str = "", lowest: float | None = None) -> bool:
    """Is it a mask, by its name or because it holds the lowest number there is?"""
    return name.endswith("mask") or (lowest is not None and lowest <= lowest_of_mask(dtype))


def _passed(pair: Pair, number: int | None, depth: int) -> int:
    """Layers passed so far; parameters none, gradients all of them and the way back."""
    _, phase, _ = pair.name.split("/")
    if phase == "param":
        return 0 if pair.at.step == 0 else 2 * depth
    if phase == "forward":
        first = number is None and _module(pair).startswith(("embed", "root"))
        return 0 if first and "input" in pair.name else depth + 1 if number is None else number + 1
    return 2 * depth + 1 if number is None else 2 * depth - number + 1


def _module(pair: Pair) -> str:
    return pair.name.partition("/")[0]
