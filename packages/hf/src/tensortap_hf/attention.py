"""Taps inside attention: query, key and value as the attention function gets them, and its result.

transformers calls `eager_attention_forward` of the modeling file, or a function out of the
registry `ALL_ATTENTION_FUNCTIONS`. Both are wrapped under the names they already have: a new name
in the registry would lose the causal mask, which is chosen by the same name. A wrapper serves the
whole process, so it looks at the `module` it is called for and passes every other call through.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tensortap.graphs import outside_graph
from tensortap.integration import Call, Observer, Site
from tensortap.undo import SharedPatch, Undo
from tensortap_hf import bytecode

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"

DIMS = {
    "query": "batch head seq dim",
    "key": "batch head seq dim",
    "value": "batch head seq dim",
    "context": "batch seq head dim",
    "probs": "batch head seq key",
}
"""`context` has the order that the output projection reads it in; key and value have the heads
of the model, which are fewer than those of the query under grouped-query attention."""

NO_PROBS = 'attention is computed without its probabilities; load with attn_implementation="eager"'


@dataclass(frozen=True, slots=True)
class _Tapped:
    site: Site
    observer: Observer


_TAPPED: WeakKeyDictionary[nn.Module, _Tapped] = WeakKeyDictionary()
_PATCHES: dict[tuple[int, str], SharedPatch] = {}


def uses_interface(module: nn.Module) -> bool:
    """Does the module look its attention function up, so that it can be tapped?"""
    return REGISTRY in bytecode.words(type(module))


def bypass(module: nn.Module) -> str | None:
    """Why the attention function of a module that uses the interface is not called after all."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn computes eager attention inside the module"
    return None


def tensors(module: nn.Module) -> tuple[str, ...]:
    """The tensors of an attention call; there are probabilities only on the eager path."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", "eager")
    eager = implementation is None or str(implementation).endswith("eager")
    return tuple(DIMS) if eager else tuple(name for name in DIMS if name != "probs")


def install(site: Site, observer: Observer, undo: Undo) -> None:
    """Report the attention calls of `site.module` until `undo` runs."""
    undo.set_item(_TAPPED, site.module, _Tapped(site, observer))
    for place in _places(type(site.module)):
        place.patch().acquire(undo)
    if "probs" not in site.tensors:
        observer.note(f"{site.name}/forward/probs", NO_PROBS)


@dataclass(frozen=True, slots=True)
class _Place:
    """A name under which attention functions are looked up: read in one mapping, set in another."""

    read: Mapping[str, Any]
    write: MutableMapping[str, Any]
    key: str

    def patch(self) -> SharedPatch:
        """The one patch of this name, however many taps use it."""
        return _PATCHES.setdefault((id(self.write), self.key), SharedPatch(self._install))

    def _install(self, undo: Undo) -> None:
        undo.set_item(self.write, self.key, observed(self.read[self.key]))


def _places(kind: type[nn.Module]) -> list[_Place]:
    """Every place where a class may find its attention function."""
    places = []
    for word in bytecode.words(kind):
        for names in bytecode.namespaces(kind, word):
            if word.endswith(_EAGER):
                places.append(_Place(names, names, word))
            elif word == REGISTRY:
                places += _registered(names[word])
    return places


def _registered(registry: MutableMapping[str, Any]) -> list[_Place]:
    """Every implementation in a registry: a model may change to another one while it is tapped."""
    # Its own entries shadow the global ones, so undoing is deleting what was absent.
    own = getattr(registry, "_local_mapping", registry)
    return [_Place(registry, own, key) for key in registry]


def observed(original: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function with the same arguments and results, reported for tapped modules."""

    @functools.wraps(original)
    def attention(
        module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        call = _begin(module, query, key, value)
        if call is None:
            return original(module, query, key, value, *args, **kwargs)
        try:
            result = original(module, query, key, value, *args, **kwargs)
        finally:
            _leave(module)
        _end(call, result)
        return result

    return attention


class _Inside(threading.local):
    """Modules whose attention this thread computes; an implementation may call another one."""

    def __init__(self) -> None:
        self.modules: set[nn.Module] = set()


_INSIDE = _Inside()


@outside_graph
def _begin(module: nn.Module, query: Any, key: Any, value: Any) -> Call | None:
    tapped = _TAPPED.get(module)
    if tapped is None or module in _INSIDE.modules:
        return None
    call = tapped.observer.enter(tapped.site)
    if call is not None:
        _INSIDE.modules.add(module)
        call.capture({"query": query, "key": key, "value": value})
    return call


@outside_graph
def _leave(module: nn.Module) -> None:
    _INSIDE.modules.discard(module)


@outside_graph
def _end(call: Call, result: Any) -> None:
    context, probs = result if isinstance(result, tuple) else (result, None)
    call.capture({"context": context, "probs": probs})
