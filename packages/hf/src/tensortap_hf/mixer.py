"""Taps inside state-space mixers: the convolution and the scan, which hooks cannot see.

A mixer hands the weights of `conv1d` and `dt_proj` to functions of its modeling file, which run
in PyTorch or, silently, in the packages causal_conv1d and mamba_ssm. The functions are wrapped
under their names. They are not told for which mixer they run; a hook on the mixer notes that.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tensortap.graphs import outside_graph
from tensortap.hooks import Hook
from tensortap.integration import Call, Observer, Site
from tensortap.undo import SharedPatch, Undo
from tensortap_hf import bytecode


@dataclass(frozen=True, slots=True)
class Function:
    """One function of the modeling files: which of its arguments are which tensors."""

    site: str
    arguments: Mapping[str, str]
    """Tensor -> parameter of the function."""
    dims: Mapping[str, str]
    keep_state: str | None = None
    """The argument that makes it return its final state as well; else it updates `state`."""


_SCAN = {"u": "hidden_states", "dt": "dt", "B": "B", "C": "C"}
_CONV = Function(
    "conv",
    {"input": "hidden_states"},
    {"input": "batch channel seq", "output": "batch channel seq"},
)
FUNCTIONS: Mapping[str, Function] = {
    "causal_conv1d_fn": _CONV,
    "causal_conv1d_update": _CONV,
    "mamba_selective_scan": Function(
        "scan",
        _SCAN,
        {
            "u": "batch channel seq",
            "dt": "batch channel seq",
            "B": "batch state seq",
            "C": "batch state seq",
            "output": "batch channel seq",
            "state": "batch channel state",
        },
        keep_state="return_last_state",
    ),
    "mamba_selective_state_update": Function(
        "scan",
        _SCAN,
        {
            "u": "batch channel",
            "dt": "batch channel",
            "B": "batch state",
            "C": "batch state",
            "output": "batch channel",
            "state": "batch channel state",
        },
    ),
    "mamba2_chunk_scan": Function(
        "scan",
        _SCAN,
        {
            "u": "batch seq head dim",
            "dt": "batch seq head",
            "B": "batch seq group state",
            "C": "batch seq group state",
            "output": "batch seq head dim",
            "state": "batch head dim state",
        },
        keep_state="return_final_states",
    ),
    "mamba2_selective_state_update": Function(
        "scan",
        _SCAN,
        {
            "u": "batch head dim",
            "dt": "batch head dim",
            "B": "batch group state",
            "C": "batch group state",
            "output": "batch head dim",
            "state": "batch head dim state",
        },
    ),
}
FUSED = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined")
"""Kernels that do all of a mixer at once in training; they return `None` where there is none."""

TENSORS: Mapping[str, tuple[str, ...]] = {
    "conv": ("input", "output"),
    "scan": ("u", "dt", "B", "C", "output", "state"),
}
_NEVER_CALLED = {"conv1d": "conv", "act": "conv", "dt_proj": "scan"}


class Replacement:
    """Stands in for `forward` of one mixer, and reports what it computes through `report`."""

    tensors: Mapping[str, tuple[str, ...]]
    """Sites it reports -> their tensors. A site called like a child takes the child's place."""


def replacement(module: nn.Module) -> Replacement | None:
    """What the forward of a mixer was replaced by; `None`: it has its own."""
    found = vars(module).get("forward")
    return found if isinstance(found, Replacement) else None


def sites_of(module: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """The function sites of a mixer, `conv` and `scan`, and their tensors."""
    replaced = replacement(module)
    if replaced is not None:
        return replaced.tensors
    used = {FUNCTIONS[word].site for word in bytecode.words(type(module)) & FUNCTIONS.keys()}
    return {site: tensors for site, tensors in TENSORS.items() if site in used}


def superseded(module: nn.Module, child: str) -> str | None:
    """The function site that stands in for a child whose hooks never fire."""
    sites = sites_of(module)
    site = _NEVER_CALLED.get(child)
    if site not in sites or child in sites:
        return None
    never = replacement(module) is not None or bytecode.never_calls(type(module), child)
    return site if never else None


@dataclass(eq=False, slots=True)
class _Tapped:
    """One mixer: its function sites by word."""

    observer: Observer
    sites: dict[str, Site] = field(default_factory=dict)


class _Inside(threading.local):
    """The mixers whose forward this thread is in."""

    def __init__(self) -> None:
        self.mixers: list[_Tapped] = []

    def enter(self, tapped: _Tapped) -> None:
        self.mixers.append(tapped)

    def leave(self, tapped: _Tapped) -> None:
        """Also of a forward that began before its tap was attached, or that raised below."""
        while tapped in self.mixers and self.mixers.pop() is not tapped:
            pass


_INSIDE = _Inside()
_PATCHES: dict[tuple[int, str], SharedPatch] = {}


def install(mixer: nn.Module, sites: list[Site], observer: Observer, undo: Undo) -> None:
    """Report the convolutions and scans of one mixer until `undo` runs."""
    tapped = _Tapped(observer, {site.name.rpartition(".")[2]: site for site in sites})
    undo.call(tapped.sites.clear)  # A detach in the middle of a forward: see no more of it.
    undo.keep(mixer.register_forward_pre_hook(Hook(lambda *_: _INSIDE.enter(tapped))))
    undo.keep(mixer.register_forward_hook(Hook(lambda *_: _INSIDE.leave(tapped)), always_call=True))
    for word in bytecode.words(type(mixer)) & {*FUNCTIONS, *FUSED}:
        for names in bytecode.namespaces(type(mixer), word):
            _patch(names, word).acquire(undo)


@outside_graph
def report(site: str) -> Call | None:
    """Begin a call of a site of the mixer whose forward this thread is in; `None`: unwanted."""
    if not _INSIDE.mixers:
        return None
    tapped = _INSIDE.mixers[-1]
    found = tapped.sites.get(site)
    return None if found is None else tapped.observer.enter(found)


def _patch(names: dict[str, Any], word: str) -> SharedPatch:
    found = _PATCHES.get((id(names), word))
    if found is None:

        def install(undo: Undo) -> None:
            original = names[word]
            wrapper = fused(original) if word in FUSED else observed(original, FUNCTIONS[word])
            undo.set_item(names, word, wrapper)

        found = _PATCHES[id(names), word] = SharedPatch(install)
    return found


def observed(original: Callable[..., Any], function: Function) -> Callable[..., Any]:
    """The function with the same arguments and results, reported inside a tapped mixer."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        call = _begin(function, bound.arguments)
        if call is None:
            return original(*args, **kwargs)
        if function.keep_state is None:
            result = original(*args, **kwargs)
            _end(call, function, result, bound.arguments.get("state"))
            return result
        asked = bound.arguments.get(function.keep_state, False)
        # The state is computed either way; asking for it changes no number.
        bound.arguments[function.keep_state] = True
        result = original(*bound.args, **bound.kwargs)
        _end(call, function, *result)
        return result if asked else result[0]

    return tapped


@outside_graph
def _begin(function: Function, arguments: Mapping[str, Any]) -> Call | None:
    call = report(function.site)
    if call is not None:
        values = {name: arguments.get(key) for name, key in function.arguments.items()}
        call.capture(values, dims=function.dims)
    return call


@outside_graph
def _end(call: Call, function: Function, output: Any, state: Any) -> None:
    # A final state that only we look at has no gradient, and later steps overwrite it in place.
    final = None if state is None else state.detach()
    call.capture({"output": output, "state": final}, dims=function.dims)


def fused(original: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for the whole mixer; where it runs, coverage says why nothing was captured."""

    @functools.wraps(original)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if result is not None:
            _note(original.__name__)
        return result

    return tapped


@outside_graph
def _note(kernel: str) -> None:
    if _INSIDE.mixers:
        tapped = _INSIDE.mixers[-1]
        for site in tapped.sites.values():
            tapped.observer.note(site.name, f"computed inside the fused kernel {kernel}")
