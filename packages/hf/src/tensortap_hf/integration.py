"""The integration for Hugging Face transformers, found through the entry point `transformers`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tensortap.generation import make_one_step
from tensortap.integration import Observer, Site
from tensortap.plugins import release
from tensortap.undo import Undo
from tensortap.wrappers import claim
from tensortap_hf import attention, fused, mixer, quamba_model
from tensortap_hf.dims import axes
from tensortap_hf.modes import operands
from tensortap_hf.modes.applied import state_of
from tensortap_hf.naming import Named, named
from tensortap_hf.words import INNER

TESTED = ("5.20", "6")
"""The transformers versions the tests run with: from the first, below the second."""

_OWN_ATTENTION = "attention is computed inside the module, not through the attention interface"


class HuggingFace:
    """Names and taps transformers models; anything that holds one is served."""

    name = "hf"
    precedence = 10

    def refuse(self, model: nn.Module) -> str | None:
        """No transformers model in it, or a transformers older than the tests run with."""
        if quamba_model.is_quamba(model):
            return None
        if not pretrained(model):
            return f"{type(model).__name__} holds no transformers PreTrainedModel."
        if release(_installed()) < release(TESTED[0]):
            return (
                f"transformers {_installed()} found; {TESTED[0]} or newer is supported. "
                "Update it, or capture under native names with using='native'."
            )
        return None

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """Every module under its canonical name, and the functions hooks cannot see."""
        if quamba_model.is_quamba(model):
            return quamba_model.sites(model)
        config = pretrained(model)[0].config
        modules = named(model, config)
        taken = {found.name for found in modules}
        silent = _silent(modules)
        replaced = _replaced(modules)
        sites: list[Site] = []
        for found in modules:
            dims = axes(found.name, found.module, config)
            sites.append(
                Site(
                    found.name,
                    found.native,
                    found.module,
                    tensors=() if found.module in replaced else ("input", "output"),
                    dims=dims,
                    placement=fused.placement(found.name, found.module, config),
                    silent=silent.get(found.module),
                )
            )
            sites += _functions(found, taken)
            sites += operands.sites(found.name, found.native, found.module, dims)
        return sites

    def install(
        self, model: nn.Module, sites: Sequence[Site], observer: Observer, undo: Undo
    ) -> None:
        """Patch attention and mixer functions for the sites that are wanted, and `generate`."""
        if quamba_model.is_quamba(model):
            quamba_model.install(sites, observer, undo)
            return
        wanted = [site for site in sites if site.silent is None and observer.wants(site)]
        if not wanted:
            return
        _install_functions([site for site in wanted if site.kind == "function"], observer, undo)
        for outermost in pretrained(model):
            make_one_step(outermost, observer, undo)
        if release(_installed()) >= release(TESTED[1]):
            observer.note("root", f"transformers {_installed()} is newer than tensortap-hf's tests")

    def describe(self, model: nn.Module) -> Mapping[str, Any]:
        """Configuration, attention implementation, version of transformers, and the mode."""
        if quamba_model.is_quamba(model):
            return {**_mode(model), **quamba_model.describe(model)}
        config = pretrained(model)[0].config
        implementation = getattr(config, "_attn_implementation", None)
        return {
            "model_config": {**config.to_dict(), "attn_implementation": implementation},
            "versions": {"transformers": _installed()},
            **_mode(model),
        }


integration = HuggingFace()


def pretrained(model: nn.Module) -> list[Any]:
    """The outermost transformers models in `model`; loads nothing that is not loaded yet."""
    library = sys.modules.get("transformers.modeling_utils")
    return list(_outermost(model, library.PreTrainedModel)) if library is not None else []


def _outermost(module: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    if isinstance(module, kind):
        yield module
        return
    for child in module.children():
        yield from _outermost(child, kind)


def _mode(model: nn.Module) -> dict[str, Any]:
    """What a run says of the mode the model is in."""
    state = state_of(model)
    if state is None:
        return {}
    mode, said = state.mode, state.to_json()
    if quamba_model.is_quamba(model):
        said["basis"] = "rotated"  # However it was loaded.
    return {"mode": mode.name, "format": mode.format, "metadata": {"mode": said}}


def _installed() -> str:
    return str(sys.modules["transformers"].__version__)


def _functions(found: Named, taken: set[str]) -> Iterator[Site]:
    """The function sites of one module."""
    core = _core(found)
    if core is not None:
        yield Site(
            claim(taken, core, f"{found.native}.core"),
            f"{found.native}:attention",
            found.module,
            kind="function",
            tensors=attention.tensors(found.module),
            dims=attention.DIMS,
            silent=_unreachable(found.module),
        )
    for word, tensors in mixer.sites_of(found.module).items():
        name, native = f"{found.name}.{word}", f"{found.native}.{word}"
        replaces = mixer.replacement(found.module) is not None and hasattr(found.module, word)
        yield Site(
            name if replaces else claim(taken, name, native),
            f"{found.native}:{word}",
            found.module,
            kind="function",
            tensors=tensors,
            forward_only=() if mixer.replacement(found.module) is None else tensors,
        )


def _core(found: Named) -> str | None:
    """The name of the attention function of a module, or `None` when it has none."""
    if attention.uses_interface(found.module):
        words = found.name.split(".")
        inner = words[-1] in INNER and words[-2:-1] in (["attn"], ["cross_attn"])
        return ".".join((words[:-1] if inner else words) + ["core"])
    is_attention = found.name.endswith((".attn", ".cross_attn"))
    delegates = any(attention.uses_interface(module) for module in found.module.modules())
    return f"{found.name}.core" if is_attention and not delegates else None


def _unreachable(module: nn.Module) -> str | None:
    return attention.bypass(module) if attention.uses_interface(module) else _OWN_ATTENTION


def _silent(modules: Sequence[Named]) -> Mapping[nn.Module, str]:
    """Modules whose hooks never fire, and which function site stands in for each."""
    return {
        child: f"superseded by {found.name}.{site}"
        for found in modules
        for key, child in found.module.named_children()
        if (site := mixer.superseded(found.module, key)) is not None
    }


def _replaced(modules: Sequence[Named]) -> set[nn.Module]:
    """Modules in whose place the forward of a mode computes, and reports."""
    return {
        child
        for found in modules
        if (forward := mixer.replacement(found.module)) is not None
        for word, child in found.module.named_children()
        if word in forward.tensors
    }


def _install_functions(sites: Sequence[Site], observer: Observer, undo: Undo) -> None:
    mixers: dict[nn.Module, list[Site]] = {}
    for site in sites:
        if operands.is_operands(site):
            operands.install(site, observer, undo)
        elif site.tensors[0] == "query":
            attention.install(site, observer, undo)
        else:
            mixers.setdefault(site.module, []).append(site)
    for module, found in mixers.items():
        mixer.install(module, found, observer, undo)
