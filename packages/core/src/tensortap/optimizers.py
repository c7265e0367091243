"""Notice when optimizers step, also when a GradScaler skips one because of an overflow.

Optimizers are found through torch's process-wide post-step hook, so none has to be named. The
hook and the patch of `GradScaler.step` are shared by all taps and gone with the last of them.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from tensortap.undo import SharedPatch, Undo

_listeners: list[Callable[[Optimizer], None]] = []
_skipping = threading.local()


def _notify(optimizer: Optimizer) -> None:
    for listener in list(_listeners):
        listener(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if getattr(_skipping, "optimizer", None) is optimizer:
        _skipping.optimizer = None
    _notify(optimizer)


def _install(undo: Undo) -> None:
    undo.keep(register_optimizer_step_post_hook(_after_step))
    scaler = torch.amp.GradScaler
    original = scaler.step

    @functools.wraps(original)
    def step(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        _skipping.optimizer = optimizer
        result = original(self, optimizer, *args, **kwargs)
        if getattr(_skipping, "optimizer", None) is optimizer:
            _skipping.optimizer = None
            _notify(optimizer)
        return result

    undo.replace(scaler, "step", step)


_patch = SharedPatch(_install)


def watch_optimizers(
    parameters: Iterable[torch.nn.Parameter], stepped: Callable[[bool], None], undo: Undo
) -> None:
    """Call `stepped(all_parameters)` after each step of an optimizer that owns `parameters`.

    `all_parameters`: the optimizers that stepped since the last `True` own every parameter
    that requires a gradient.
    """
    ours = {id(parameter) for parameter in parameters if parameter.requires_grad}
    owned_by: weakref.WeakKeyDictionary[Optimizer, set[int]] = weakref.WeakKeyDictionary()
    covered: set[int] = set()

    def listener(optimizer: Optimizer) -> None:
        owned = owned_by.get(optimizer)
        if owned is None:
            members = (p for group in optimizer.param_groups for p in group["params"])
            owned = owned_by[optimizer] = ours.intersection(map(id, members))
        if not owned:
            return
        covered.update(owned)
        complete = covered == ours
        if complete:
            covered.clear()
        stepped(complete)

    _patch.acquire(undo)
    _listeners.append(listener)
    undo.call(lambda: _listeners.remove(listener))
