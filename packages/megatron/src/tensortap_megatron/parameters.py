"""Axes of the parameters of every kind of module, how ranks share them and their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from tensortap.records import Part
from tensortap_megatron import parts
from tensortap_megatron.facts import Facts
from tensortap_megatron.naming import Named
from tensortap_megatron.placements import Axis, Plan, Plans
from tensortap_megatron.shards import Cut, fused, split, whole


def plans(named: Named, facts: Facts) -> Plans:
    """Parameters a module owns itself -> their plans, by canonical name."""
    found = {}
    for name, parameter in named.module.named_parameters(recurse=False):
        plan = _plan(named, name, parameter, facts)
        if plan is not None:
            found[name] = replace(plan, partial_gradient=_sums(named, parameter, facts))
    return found


def weight(named: Named, facts: Facts) -> Plan:
    """The weight of a parallel linear layer: [out, in]."""
    if parts.row_parallel(named.module):
        return Plan((Axis("out"), Axis("in", split(parts.group_of(named, facts)))))
    axes = (_outputs(named, facts), Axis("in"))
    return Plan(axes, _parts(named, facts), unknown=parts.unplaced(named))


def norm_plans(named: Named, facts: Facts, words: Mapping[str, str]) -> Plans:
    """Parameters of a norm that is fused into a linear layer, under their own words."""
    own = plans(named, facts)
    return {word: own[native] for native, word in words.items() if native in own}


def expert_plans(named: Named, facts: Facts) -> Plans:
    """Parameters of one expert of a grouped linear layer, as if the expert were a module."""
    sums = ("edp",) if facts.parallel["edp"].size > 1 else ()
    every = {"weight": weight(named, facts), "bias": _bias(named, facts)}
    return {word: replace(plan, partial_gradient=sums) for word, plan in every.items()}


def tied_plan(embed: Named, facts: Facts) -> Plan:
    """The output layer's copy of a tied embedding, as if it were the embedding."""
    axes = (Axis("vocab", facts.over_tensor, facts.vocabulary), Axis("hidden"))
    return Plan(axes, partial_gradient=(*facts.replicas, *_stage_sum(embed, facts)))


def _plan(named: Named, name: str, parameter: nn.Parameter, facts: Facts) -> Plan | None:
    if parts.is_linear(named.module):
        return _of_linear(named, name, facts)
    if named.word == "embed" and name == "weight":
        return Plan((Axis("vocab", facts.over_tensor, facts.vocabulary), Axis("hidden")))
    # Before 0.16 the gated norm's weight is not marked as split, although it is.
    if named.word in _OF_MIXERS:
        return _of_mixer(named, parameter, facts)
    if named.word == "mlp.router" and name == "weight":
        return Plan((Axis("expert"), Axis("hidden")))
    if named.word.endswith("experts"):
        return None  # Stacked experts of a grouped GEMM: only Megatron's kernels know the order.
    if getattr(parameter, "tensor_model_parallel", False) and facts.tp.size > 1:
        return Plan((), unknown=True)
    # Norms, position embeddings and the like: the same on every rank.
    return Plan(tuple(Axis(word) for word in _WORDS[parameter.dim()]))


_WORDS = ((), ("hidden",), ("out", "in"), ("out", "in", "kernel"), ("a", "b", "c", "d"))


_OF_MIXERS = ("mixer", "mixer.conv", "mixer.norm")


def _of_linear(named: Named, name: str, facts: Facts) -> Plan | None:
    if name == "weight":
        return weight(named, facts)
    if name == "bias":
        return _bias(named, facts)
    if name.startswith("layer_norm_"):
        return Plan((Axis("hidden"),))
    return None  # Grouped experts number their weights.


def _bias(named: Named, facts: Facts) -> Plan:
    if parts.row_parallel(named.module):
        return Plan((Axis("out"),))
    return Plan((_outputs(named, facts),), _parts(named, facts), unknown=parts.unplaced(named))


def _outputs(named: Named, facts: Facts) -> Axis:
    if parts.is_head(named):
        return Axis("vocab", facts.over_tensor, facts.vocabulary)
    return Axis("out", parts.column_cut(named, facts))


def _parts(named: Named, facts: Facts) -> tuple[Part, ...]:
    return parts.of_output(named, facts, axis=0)


def _of_mixer(named: Named, parameter: nn.Parameter, facts: Facts) -> Plan:
    """Convolution over x, B and C; one number a head, or a channel, for the others."""
    cut: Cut = split(facts.tp)
    if named.native.endswith("conv1d"):
        _, inner, state, _, _ = parts.mixer_shares(facts.config)
        cut = fused(facts.tp, (inner, state, state))
    rest = [Axis(word, whole) for word in ("in", "kernel")[: parameter.dim() - 1]]
    return Plan((Axis("channel", cut), *rest))


def _sums(named: Named, parameter: nn.Parameter, facts: Facts) -> tuple[str, ...]:
    """Groups whose ranks have only a share of the gradient, until Megatron reduces it."""
    if named.in_expert:
        return ("edp",) if facts.parallel["edp"].size > 1 else ()
    return (*facts.replicas, *_tensor_sum(named, parameter, facts), *_stage_sum(named, facts))


def _tensor_sum(named: Named, parameter: nn.Parameter, facts: Facts) -> tuple[str, ...]:
    """Norms see a part of the tokens under sequence parallelism, those of heads a part of these.

    Multi-latent attention normalises what all heads share, on every rank.
    """
    latent = getattr(facts.config, "multi_latent_attention", False)
    of_heads = named.native.endswith(("q_layernorm", "k_layernorm")) and not latent
    replicated = getattr(parameter, "sequence_parallel", False) or of_heads
    return ("tp",) if replicated and facts.tp.size > 1 else ()


def _stage_sum(named: Named, facts: Facts) -> tuple[str, ...]:
    """A tied embedding is held by the first and the last stage, each with its own gradient."""
    tied = facts.tied and named.word == "embed" and facts.parallel["embd"].size > 1
    return ("embd",) if tied else ()
