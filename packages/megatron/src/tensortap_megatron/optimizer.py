"""The end of a step: Megatron's optimizer has stepped, or skipped an overflow.

Megatron's optimizers are no `torch.optim.Optimizer`, and those of mixed precision give torch's
optimizer copies of the parameters, so their own `step` is watched.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from tensortap.undo import SharedPatch, Undo

_LISTENERS: list[Callable[[Any], None]] = []
_INSIDE = threading.local()


def watch(model: nn.Module, ended: Callable[[], None], undo: Undo) -> None:
    """Call `ended` after each step of a Megatron optimizer that owns parameters of `model`."""
    ours = {id(parameter) for parameter in model.parameters()}

    def listener(optimizer: Any) -> None:
        owned = {id(parameter) for parameter in _parameters(optimizer)}
        if not owned or owned & ours:
            ended()

    _PATCH.acquire(undo)
    _LISTENERS.append(listener)
    undo.call(lambda: _LISTENERS.remove(listener))


def _install(undo: Undo) -> None:
    from megatron.core.optimizer import optimizer

    for name in ("MixedPrecisionOptimizer", "FP32Optimizer", "ChainedOptimizer"):
        kind = getattr(optimizer, name)
        undo.replace(kind, "step", _watched(kind.step))


_PATCH = SharedPatch(_install)


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        outermost = not getattr(_INSIDE, "step", False)
        _INSIDE.step = True
        try:
            result = original(self, *args, **kwargs)
        finally:
            if outermost:
                _INSIDE.step = False
        for listener in list(_LISTENERS) if outermost else ():
            listener(self)
        return result

    return step


def _parameters(optimizer: Any) -> Iterator[Any]:
    """The model's parameters an optimizer steps, wherever its kind keeps them."""
    for chained in getattr(optimizer, "chained_optimizers", ()):
        yield from _parameters(chained)
    yield from getattr(optimizer, "model_param_gbuf_map", ())
    for word in ("float16_groups", "fp32_from_fp32_groups"):
        yield from _flat(getattr(optimizer, word, ()))
    # Only these are the model's own: a mixed-precision optimizer's groups hold main copies.
    if type(optimizer).__name__ == "FP32Optimizer" and optimizer.optimizer is not None:
        for group in optimizer.optimizer.param_groups:
            yield from group["params"]


def _flat(groups: Iterable[Iterable[Any]]) -> Iterator[Any]:
    for group in groups:
        yield from group
