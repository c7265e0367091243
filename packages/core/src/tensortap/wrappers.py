"""Wrappers: modules that hold a model without changing what it means, such as DDP."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from tensortap.names import escape

_WORDS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_CLASSES = frozenset(
    {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "Float16Module"}
)


def wrapped(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds the module it stands for; `None` for others."""
    children = list(module._modules)
    if len(children) != 1:
        return None
    [word] = children
    return word if word in _WORDS or type(module).__name__ in _CLASSES else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, `torch.compile` and similar wrappers."""
    word = wrapped(model)
    return model if word is None else unwrap(model.get_submodule(word))


def unwrapped_modules(
    model: nn.Module, wrapped: Callable[[nn.Module], str | None] = wrapped
) -> Iterator[tuple[str, str, nn.Module]]:
    """(native path, path without the words of wrappers, module) of all that are no wrappers.

    In the order of `named_modules`, each module once.
    """
    return _below(model, "", "", wrapped, set())


def _below(
    module: nn.Module,
    native: str,
    path: str,
    wrapped: Callable[[nn.Module], str | None],
    seen: set[nn.Module],
) -> Iterator[tuple[str, str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    inner = wrapped(module)
    if inner is None:
        yield native, path, module
    for key, child in module._modules.items():
        if child is not None:
            below = path if key == inner else _join(path, key)
            yield from _below(child, _join(native, key), below, wrapped, seen)


def _join(path: str, word: str) -> str:
    return f"{path}.{word}" if path else word


def claim(taken: set[str], name: str, path: str) -> str:
    """The first of a name and its native path that is free, escaped; takes it."""
    wanted, fallback = escape(name), escape(path)
    while wanted in taken:
        wanted, fallback = fallback, fallback + "_"
    taken.add(wanted)
    return wanted
