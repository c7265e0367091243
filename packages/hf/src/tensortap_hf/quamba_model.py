"""Taps a `QuambaLMHeadModel`, the int8 model of the package quamba, which runs on its own kernels.

Its mixers call most of their parts by methods that hooks do not see (`in_proj.to_seqlen_last`,
`conv1d.forward`, `selective_scan.update`), so those are watched under the names that the emulated
modes have. A block returns its mixer's output and the residual apart; the layer's output, their
sum, is added up here. Everything is in the rotated basis. Written from the package's public code
(github.com/enyac-group/Quamba): it needs a GPU, and the tests run on stand-ins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tensortap.hooks import Hook
from tensortap.integration import Call, Observer, Site
from tensortap.records import FormatInfo
from tensortap.undo import Undo
from tensortap_hf.naming import Named, named

CLASS = "QuambaLMHeadModel"

_INT8 = FormatInfo("int8")
_SUM = "sum"
_STATE = "return_last_state"
"""The argument that makes a scan return its state as well."""

_METHODS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "in_proj": ("in_proj", ("forward", "to_seqlen_last")),
    "x_proj": ("x_proj", ("forward",)),
    "dt_proj": ("dt_proj", ("forward", "to_seqlen_last")),
    "conv": ("conv1d", ("forward", "update")),
    "scan": ("selective_scan", ("forward", "update")),
}
"""Site -> the child of a mixer, and the methods it is called by."""

_SCALES: Mapping[str, Mapping[str, str | None]] = {
    "in_proj": {"input": None, "output": "z_scale"},
    "x_proj": {"input": "u_scale", "output": "B_scale"},
    "dt_proj": {"input": "B_scale", "output": "dt_scale"},
    "conv": {"input": "z_scale", "output": "u_scale"},
    "scan": {
        "u": "u_scale",
        "dt": "dt_scale",
        "B": "B_scale",
        "C": "C_scale",
        "output": None,
        "state": "ssm_state_scale",
    },
}
"""Site -> its tensors -> their scales, as the mixer's `selective_scan` calls them."""


def is_quamba(model: nn.Module) -> bool:
    """Is this the package's model? Told by the name of its class: the package is not imported."""
    return any(kind.__name__ == CLASS for kind in type(model).__mro__)


def sites(model: nn.Module) -> Sequence[Site]:
    """Modules under the names of a Hugging Face Mamba, and what hooks cannot see of them."""
    found: list[Site] = []
    replaced: set[nn.Module] = set()
    for one in _named(model):
        added = list(_functions(one))
        replaced.update(getattr(one.module, _METHODS[word][0]) for word in _parts(one.module))
        hidden = one.module in replaced or _is_block(one.module)
        tensors = () if hidden else ("input", "output")
        found += [Site(one.name, one.native, one.module, tensors=tensors), *added]
    return found


def install(sites: Sequence[Site], observer: Observer, undo: Undo) -> None:
    """Watch the methods of the wanted sites."""
    for site in sites:
        if site.kind == "function" and observer.wants(site):
            word = site.native.rpartition(":")[2]
            if word == _SUM:
                _watch_sum(site, observer, undo)
                continue
            child, methods = _METHODS[word]
            part = getattr(site.module, child)
            for method in methods:
                if hasattr(part, method):
                    undo.replace(part, method, _Watched(part, method, site, word, observer))


def describe(model: nn.Module) -> Mapping[str, Any]:
    """Configuration and version of the package, and that its numbers are int8, rotated."""
    try:
        versions = {"quamba": version("quamba")}
    except PackageNotFoundError:
        versions = {}
    return {
        "model_config": dict(vars(getattr(model, "config", SimpleNamespace()))),
        "versions": versions,
        "format": "int8",
    }


def _named(model: nn.Module) -> Iterator[Named]:
    """Canonical names; `embedding` is mamba_ssm's word."""
    for one in named(model, SimpleNamespace(model_type="quamba")):
        name = "embed" if one.name in ("embedding", "backbone.embedding") else one.name
        yield Named(name, one.native, one.module)


def _functions(one: Named) -> Iterator[Site]:
    if _is_block(one.module):
        yield _site(one.name, f"{one.native}:{_SUM}", one.module, ("input", "output"))
    for word in _parts(one.module):
        scales = _SCALES[word]
        shown = (*scales, *(f"{name}_scale" for name, scale in scales.items() if scale))
        yield _site(f"{one.name}.{word}", f"{one.native}:{word}", one.module, shown)


def _site(name: str, native: str, module: nn.Module, tensors: tuple[str, ...]) -> Site:
    return Site(name, native, module, kind="function", tensors=tensors, forward_only=tensors)


def _is_block(module: nn.Module) -> bool:
    return hasattr(module, "mixer") and hasattr(module, "norm")


def _parts(module: nn.Module) -> list[str]:
    """The parts of a mixer of Mamba with int8 activations; other mixers have only modules."""
    if not hasattr(getattr(module, "selective_scan", None), "u_scale"):
        return []
    return [word for word, (child, _) in _METHODS.items() if hasattr(module, child)]


def _watch_sum(site: Site, observer: Observer, undo: Undo) -> None:
    """Report what goes into a block and comes out of it, each with its residual added."""
    calls: list[Call | None] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        residual = args[1] if len(args) > 1 else kwargs.get("residual")
        call = observer.enter(site)
        calls[:] = [call]
        if call is not None:
            call.capture({"input": _added(hidden, residual)})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = calls.pop() if calls else None
        if call is not None:
            call.capture({"output": _added(*output[:2])})

    undo.keep(site.module.register_forward_pre_hook(Hook(observer.guard(before)), with_kwargs=True))
    undo.keep(site.module.register_forward_hook(Hook(observer.guard(after))))


def _added(hidden: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The sum in the dtype of the residual; the first block is given none."""
    return hidden if residual is None else hidden.to(residual.dtype) + residual


class _Watched:
    """A method of one part of a mixer; a copy of the part has its own."""

    def __init__(
        self, part: nn.Module, method: str, site: Site, word: str, observer: Observer
    ) -> None:
        self._part, self._method = part, method
        self._site, self._word, self._observer = site, word, observer
        self._original: Callable[..., Any] = getattr(part, method)
        self._signature = inspect.signature(self._original)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[nn.Module, str]]:
        return getattr, (self._part, self._method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The original method, its tensors reported."""
        call = self._observer.enter(self._site)
        if call is None:
            return self._original(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs)
        given = bound.arguments
        self._show(call, given if self._word == "scan" else {"input": next(iter(given.values()))})
        if _STATE not in self._signature.parameters:
            result = self._original(*args, **kwargs)
            output, state = result if isinstance(result, tuple) else (result, None)
            self._show(call, {"output": self._by_name(output), "state": state})
            return result
        asked = given.get(_STATE, False)
        given[_STATE] = True  # The kernel computes the state either way.
        output, state = self._original(*bound.args, **bound.kwargs)
        self._show(call, {"output": self._by_name(output), "state": state})
        return (output, state) if asked else output

    def _show(self, call: Call, tensors: Mapping[str, Any]) -> None:
        scan = getattr(self._site.module, "selective_scan", None)
        for name, scale in _SCALES[self._word].items():
            tensor = tensors.get(name)
            if not isinstance(tensor, torch.Tensor):
                continue
            is_codes = tensor.dtype == torch.int8
            call.capture({name: tensor}, format=_INT8 if is_codes else None)
            if scale is not None and is_codes:
                call.capture({f"{name}_scale": getattr(scan, scale)})

    def _by_name(self, output: torch.Tensor) -> torch.Tensor:
        """With the axes that the emulated modes have."""
        turned = self._method == "to_seqlen_last" or self._word == "scan"
        return output.mT if turned and output.dim() == 3 else output
