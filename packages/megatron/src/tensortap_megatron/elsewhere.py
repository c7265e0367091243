"""Modules and names that other ranks have: other layers, other stages, other experts.

Found from the configuration of the whole model, without asking the other ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tensortap.choices import tensors_of
from tensortap.integration import Site
from tensortap_megatron import experts, linears, operands
from tensortap_megatron.facts import Facts, configured


@dataclass(frozen=True, slots=True)
class Kind:
    """What the modules of one kind yield."""

    forward: tuple[str, ...] = ("input", "output")
    parameters: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    """Forward tensors without gradients."""
    backward: tuple[str, ...] = ()
    product: bool = False
    """Is it one of the matrix products that can be quantised?"""


_BLOCK = Kind()
_NORM = Kind(parameters=("weight", "bias"))
_LINEAR = Kind(
    parameters=("weight", "bias"),
    extra=linears.TENSORS,
    backward=linears.BACKWARD,
    product=True,
)
_CORE = Kind(
    ("query", "key", "value", "context", "probs"),
    extra=operands.ATTENTION,
    product=True,
)
_ROUTED = Kind(extra=experts.TENSORS)

_EDGES: Mapping[str, Kind] = {
    "root": _BLOCK,
    "embedding": _BLOCK,
    "embed": _NORM,
    "embed.position": _NORM,
    "embedding.embedding_dropout": _BLOCK,
    "decoder": _BLOCK,
    "final_norm": _NORM,
    "lm_head": _LINEAR,
}
"""What only the first or the last stage has."""

_LAYER: Mapping[str, Kind] = {
    "": _BLOCK,
    "input_norm": _NORM,
    "attn": _BLOCK,
    **{f"attn.{word}": _LINEAR for word in ("qkv", "q", "k", "v", "out")},
    "attn.core": _CORE,
    "post_attn_norm": _NORM,
    "mlp": _BLOCK,
    "mlp.down": _LINEAR,
}
_MIXER: Mapping[str, Kind] = {
    "norm": _NORM,
    "mixer": Kind(parameters=("A_log", "D", "dt_bias")),
    "mixer.in_proj": _LINEAR,
    "mixer.conv": _NORM,
    "mixer.norm": _NORM,
    "mixer.out_proj": _LINEAR,
}


def modules(facts: Facts) -> dict[str, Kind]:
    """Modules that some rank of the model has, by canonical name; empty when this one has all."""
    stages = configured(facts.config, "pipeline_model_parallel_size")
    shares = configured(facts.config, "expert_model_parallel_size")
    if max(stages, shares, facts.parallel["pp"].size, facts.parallel["ep"].size) == 1:
        return {}
    layers = range(configured(facts.config, "num_layers"))
    found = dict(_EDGES)
    for word, kind in _words(facts):
        tail = f".{word}" if word else ""
        found |= {f"layers.{number}{tail}": kind for number in layers}
    return found


def names(sites: Sequence[Site], facts: Facts) -> list[str]:
    """Every name of any rank; those of this rank's sites, in every layer, are among them."""
    everywhere = modules(facts)
    if not everywhere:
        return []
    found = dict.fromkeys(name for module, kind in everywhere.items() for name in _of(module, kind))
    layers = configured(facts.config, "num_layers")
    for site in sites:
        for number in range(layers) if _NUMBER.search(site.name) else (0,):
            name = _NUMBER.sub(f"layers.{number}", site.name)
            for phase in ("forward", "backward"):
                found |= dict.fromkeys(f"{name}/{phase}/{t}" for t in tensors_of(site, phase))
    return list(found)


_NUMBER = re.compile(r"^layers\.\d+")


def _words(facts: Facts) -> Iterator[tuple[str, Kind]]:
    """Every kind of module that a layer of this model may hold."""
    yield from _LAYER.items()
    yield from _up("mlp", facts)
    if getattr(facts.config, "qk_layernorm", False):
        yield from (("attn.q_norm", _NORM), ("attn.k_norm", _NORM))
    if facts.mixers:
        yield from _MIXER.items()
    if configured(facts.config, "num_moe_experts"):
        yield from (("mlp.router", _NORM), ("mlp.experts", _ROUTED))
        yield from _mlp("mlp.shared_expert", facts)
        for expert in range(configured(facts.config, "num_moe_experts")):
            yield from _mlp(f"mlp.experts.{expert}", facts)


def _mlp(name: str, facts: Facts) -> Iterator[tuple[str, Kind]]:
    yield name, _BLOCK
    yield f"{name}.down", _LINEAR
    yield from _up(name, facts)


def _up(name: str, facts: Facts) -> Iterator[tuple[str, Kind]]:
    gated = getattr(facts.config, "gated_linear_unit", False)
    for word in ("gate_up", "gate", "up") if gated else ("up",):
        yield f"{name}.{word}", _LINEAR


def _of(module: str, kind: Kind) -> Iterator[str]:
    yield from (f"{module}/forward/{tensor}" for tensor in (*kind.forward, *kind.extra))
    yield from (f"{module}/backward/grad_{tensor}" for tensor in kind.forward)
    yield from (f"{module}/backward/{tensor}" for tensor in kind.backward)
    yield from (
        f"{module}/{phase}/{name}" for phase in ("param", "grad") for name in kind.parameters
    )
