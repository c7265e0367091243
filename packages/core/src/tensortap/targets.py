"""What may be attached to: real modules, tapped once, not compiled yet."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from tensortap.backends import LazyBackend, lazy_backends
from tensortap.errors import AlreadyAttached, ConfigError, NotSupported
from tensortap.undo import Undo

_tapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def modules_to_tap(model: Any) -> list[nn.Module]:
    """`attach`'s first argument as a list of modules; raises when one cannot be tapped."""
    models = list(model) if isinstance(model, (list, tuple)) else [model]
    for module in models:
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"attach() taps a torch.nn.Module or a list of them, not {type(module).__name__}."
            )
        _refuse_second_tap(module)
        _refuse_compiled(module)
        _refuse_lazy(module)
    if not models:
        raise ConfigError("attach() was given an empty list of models.")
    return models


def lazily_run(model: Any) -> list[LazyBackend]:
    """The lazy backends of the devices a model, or a list of models, lies on."""
    models = model if isinstance(model, (list, tuple)) else [model]
    tensors = (
        tensor
        for module in models
        if isinstance(module, nn.Module)
        # Megatron's DistributedDataParallel has an attribute called `buffers`.
        for tensor in (*nn.Module.parameters(module), *nn.Module.buffers(module))
    )
    return lazy_backends({tensor.device for tensor in tensors})


def mark_tapped(roots: Iterable[nn.Module], undo: Undo) -> None:
    """Remember that these models, with all they hold, have a tap."""
    modules = [module for root in roots for module in root.modules()]
    _tapped.update(modules)
    undo.call(lambda: _tapped.difference_update(modules))


def _refuse_second_tap(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module in _tapped:
            where = f"its module {path!r}" if path else "it"
            raise AlreadyAttached(
                f"{type(model).__name__} cannot be attached: {where} has a tap. Call detach() on "
                "that tap first, or widen its select= instead of attaching twice."
            )


def _refuse_compiled(model: nn.Module) -> None:
    """Dynamo drops hooks that are registered after a module was compiled, without a word."""
    if isinstance(model, torch.jit.ScriptModule):
        raise NotSupported(
            "TorchScript modules run no Python hooks; attach to the module before torch.jit.script."
        )
    for module in model.modules() if "torch._dynamo" in sys.modules else ():
        if _has_compiled_code(module):
            raise NotSupported(
                f"{type(module).__name__} has run under torch.compile already, and compiled code "
                "ignores hooks that come later. Attach before the first call, or call "
                "torch.compiler.reset() first."
            )


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise NotSupported(
                f"The parameter {name} has no shape yet; run the model once, then attach."
            )


def _has_compiled_code(module: nn.Module) -> bool:
    from torch._dynamo.eval_frame import OptimizedModule

    if isinstance(module, OptimizedModule) or "forward" in vars(module):
        return False  # Its code is the wrapped module's, which is asked in its own turn.
    code = getattr(type(module).forward, "__code__", None)
    entries = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
    if code is None or not entries(code):
        return False
    # The code is that of the class: it may have been compiled for another instance.
    holders = (holder for holder in gc.get_referrers(module) if isinstance(holder, dict))
    wrapped = any(holder.get("_orig_mod") is module for holder in holders)
    return wrapped or module._compiled_call_impl is not None
