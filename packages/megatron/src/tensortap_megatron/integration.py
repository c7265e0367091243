"""The integration for Megatron-core, found through the entry point `megatron.core`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tensortap.integration import Observer, Site
from tensortap.plugins import release
from tensortap.undo import Undo
from tensortap_megatron import (
    activations,
    elsewhere,
    experts,
    linears,
    mixers,
    operands,
    optimizer,
    parameters,
    parts,
    transformer_engine,
)
from tensortap_megatron.facts import Facts
from tensortap_megatron.gradients import accumulated, late
from tensortap_megatron.naming import Named, is_layer, modules
from tensortap_megatron.placements import SitePlans
from tensortap_megatron.quantization import format_of

TESTED = ("0.14", "0.17")
"""The megatron-core versions that are supported: from the first, below the second."""

_CORE_WORDS = {
    "input": "query",
    "input.query": "query",
    "input.1": "key",
    "input.key": "key",
    "input.2": "value",
    "input.value": "value",
    "input.3": "input.attention_mask",
    "output": "context",
}

_INSTALL: Mapping[str, Callable[[Site, Observer, Undo], object]] = {
    "product": linears.install,
    "products": operands.register,
    "routing": experts.install,
}
"""How the function sites are tapped, by what follows the colon in their native names."""


class Megatron:
    """Names, places and taps Megatron-core models; anything that holds one is served."""

    name = "megatron"
    precedence = 20

    def refuse(self, model: nn.Module) -> str | None:
        """No Megatron module in it, or a megatron-core older than is supported."""
        library = sys.modules.get("megatron.core.transformer.module")
        if library is None or not any(
            isinstance(m, library.MegatronModule) for m in model.modules()
        ):
            return f"{type(model).__name__} holds no Megatron-core module."
        if release(_installed()) < release(TESTED[0]):
            return (
                f"megatron-core {_installed()} found; {TESTED[0]} to 0.16 are supported. "
                "Update it, or capture under native names with using='native'."
            )
        return None

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """Every module under its canonical name, and what hooks on it cannot see."""
        facts = Facts.of(model)
        return [site for named in modules(model) for site in _sites(named, facts)]

    def elsewhere(self, model: nn.Module) -> Sequence[str]:
        """Names on other pipeline stages and expert ranks, from the model's global sizes."""
        return elsewhere.names(self.sites(model), Facts.of(model))

    def install(
        self, model: nn.Module, sites: Sequence[Site], observer: Observer, undo: Undo
    ) -> None:
        """Watch products, routing and the optimizer for the sites that are wanted."""
        for site in sites:
            if site.kind == "function" and observer.wants(site):
                _INSTALL[site.native.rpartition(":")[2]](site, observer, undo)
            elif observer.wants(site):
                transformer_engine.explain(site, observer)
        mixers.explain(sites, observer)
        optimizer.watch(model, observer.end_step, undo)
        if release(_installed()) >= release(TESTED[1]):
            observer.note("root", f"megatron-core {_installed()} is newer than was tested")

    def describe(self, model: nn.Module) -> Mapping[str, Any]:
        """Configuration, process groups, the active fake quantisation, and versions."""
        facts = Facts.of(model)
        return {
            "model_config": _plain(facts.config),
            "parallel": facts.parallel.described(),
            "format": format_of(model),
            "versions": _versions(),
        }


integration = Megatron()


def _sites(named: Named, facts: Facts) -> Iterator[Site]:
    """The sites of one module."""
    plans = SitePlans(
        activations.plans(named, facts),
        parameters.plans(named, facts),
        shared_arguments=facts.parallel["cp"].size == 1 and not named.in_expert,
    )
    rule = plans.rule(spread=facts.parallel.spread)
    words: Mapping[str, str | None] = _words(named, facts)

    def site(native: str, tensors: Sequence[str], **more: Any) -> Site:
        fields = {"dims": plans.dims, "placement": rule, "gradient": accumulated, **more}
        fields |= {"parts": parts.of_input(named), "late_parameters": late(named.module)}
        return Site(
            fields.pop("name", named.name), native, named.module, tensors=tuple(tensors), **fields
        )

    yield site(named.native, _tensors(words), words=words, silent=_silent(named))
    if parts.has_norm(named.module):
        yield transformer_engine.norm_site(named, facts)
    yield from transformer_engine.expert_sites(named, facts)
    if parts.is_linear(named.module) and not parts.experts_of(named.module):
        native = f"{named.native}:product"
        yield site(
            native,
            linears.TENSORS,
            kind="function",
            forward_only=linears.TENSORS,
            backward=linears.BACKWARD,
        )
    if named.word.endswith(".core"):
        yield from _core_sites(named, site)
    if experts.dispatcher_of(named.module) is not None:
        yield _routing(named, spread=facts.parallel.spread)
    if facts.tied and facts.last_stage and not facts.first_stage and named.word == "lm_head":
        yield _tied(named, facts)


def _tensors(words: Mapping[str, str | None]) -> list[str]:
    """What a module's hooks yield, in our words."""
    found = [words.get("input", "input"), words.get("input.1"), words.get("input.2")]
    return [word for word in (*found, words.get("output", "output")) if word is not None]


def _words(named: Named, facts: Facts) -> dict[str, str | None]:
    """What hooks see at a module -> our words for it."""
    if named.word.endswith(".core"):
        return dict(_CORE_WORDS)
    if named.word == "layer" or is_layer(named.module):
        return {"input.hidden_states": "input"}
    if named.word in ("root", "decoder") and not facts.last_stage:
        # A stage hands on what its last layer returns; under one name it would meet the loss.
        return {"output": None}
    if parts.has_norm(named.module):
        return transformer_engine.norm_words()
    if parts.experts_of(named.module):
        return transformer_engine.grouped_words(named.module)
    if parts.is_linear(named.module):
        tied = facts.tied and not facts.first_stage and named.word == "lm_head"
        return {"output.1": None, "input.weight": None, **({"weight": None} if tied else {})}
    # A bias that is added later is a parameter, recorded as such.
    return (
        {"output.1": None, **transformer_engine.block_words(named)}
        if named.word in _WITH_BIAS
        else {}
    )


_WITH_BIAS = ("attn", "cross_attn", "mlp", "mlp.shared_expert", "mixer")


def _silent(named: Named) -> str | None:
    if named.native.endswith("core_attention.scale_mask_softmax"):
        return f"superseded by {named.name.rpartition('.')[0]} (probs)"
    if isinstance(named.module, nn.Dropout) and named.module.p == 0:
        return "a dropout of nothing: its output is its input"
    return None


def _core_sites(named: Named, site: Any) -> Iterator[Site]:
    """Attention probabilities, and the operands of quantised attention products."""
    softmax = getattr(named.module, "scale_mask_softmax", None)
    if isinstance(softmax, nn.Module):
        inputs = dict.fromkeys(("input", "input.1", "input.2"))
        probs = site(f"{named.native}.scale_mask_softmax", ("probs",))
        yield dataclasses.replace(probs, module=softmax, words={**inputs, "output": "probs"})
    yield site(
        f"{named.native}:products",
        operands.ATTENTION,
        kind="function",
        forward_only=operands.ATTENTION,
    )


def _routing(named: Named, *, spread: bool) -> Site:
    """Which tokens the experts of an MoE layer get; hooked at the experts themselves."""
    return Site(
        f"{named.name}.experts",
        f"{named.native}:routing",
        named.module,
        kind="function",
        tensors=experts.TENSORS,
        forward_only=experts.TENSORS,
        dims={"token_index": "token"},
        placement=SitePlans().rule(spread=spread),
    )


def _tied(named: Named, facts: Facts) -> Site:
    """The last stage's copy of a tied embedding: `embed/param/weight`, as on the first stage."""
    embed = Named("embed", named.native, named.module)
    plans = SitePlans({}, {"weight": parameters.tied_plan(embed, facts)})
    return Site(
        "embed",
        f"{named.native}:tied",
        named.module,
        tensors=(),
        dims=plans.dims,
        placement=plans.rule(spread=False),
        words=dict.fromkeys(("input", "output", "output.1", "bias")),
        gradient=accumulated,
    )


def _installed() -> str:
    return str(sys.modules["megatron.core"].__version__)


def _versions() -> dict[str, str]:
    found = {"megatron-core": _installed()}
    version = getattr(sys.modules.get("transformer_engine"), "__version__", None)
    return found if version is None else found | {"transformer-engine": str(version)}


def _plain(config: Any) -> dict[str, Any]:
    """A configuration's fields that JSON can hold; functions by their names."""
    if not dataclasses.is_dataclass(config):
        return {}
    values = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(config)}
    return {name: _simple(value) for name, value in values.items() if value is not None}


def _simple(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_simple(item) for item in value]
    return getattr(value, "__name__", None) or str(value)
