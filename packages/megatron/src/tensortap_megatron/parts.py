"""Megatron's parallel linear layers: which way they are split, and what is fused in them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tensortap.records import Part, Segment
from tensortap_megatron.facts import Facts, configured
from tensortap_megatron.naming import Named, is_a
from tensortap_megatron.parallel import Group
from tensortap_megatron.shards import Cut, fused, split

_COLUMN = frozenset(
    {
        "ColumnParallelLinear",
        "TEColumnParallelLinear",
        "TELayerNormColumnParallelLinear",
        "TEColumnParallelGroupedLinear",
    }
)
_ROW = frozenset({"RowParallelLinear", "TERowParallelLinear", "TERowParallelGroupedLinear"})
_FUSED_NORM = frozenset({"TELayerNormColumnParallelLinear"})
_GROUPED = frozenset({"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"})


def column_parallel(module: nn.Module) -> bool:
    """Is the weight split along its outputs?"""
    return is_a(module, *_COLUMN)


def row_parallel(module: nn.Module) -> bool:
    """Is the weight split along its inputs?"""
    return is_a(module, *_ROW)


def is_linear(module: nn.Module) -> bool:
    """Is it one of Megatron's parallel linear layers, its own or Transformer Engine's?"""
    return column_parallel(module) or row_parallel(module)


def has_norm(module: nn.Module) -> bool:
    """Does Transformer Engine normalise inside of this linear layer?"""
    return is_a(module, *_FUSED_NORM)


def experts_of(module: nn.Module) -> int:
    """How many experts' weights (weight0, weight1, …) a grouped linear layer holds, or none."""
    return int(getattr(module, "num_gemms", 0)) if is_a(module, *_GROUPED) else 0


def gated(named: Named, facts: Facts) -> bool:
    """Does it hold a gate and an up projection? Those of multi-token prediction say so nowhere."""
    unnamed = named.native.endswith(".linear_fc1") and ".gate_up" not in named.name
    config = _config(named, facts)
    return named.word.endswith(".gate_up") or (
        unnamed and bool(getattr(config, "gated_linear_unit", False))
    )


def is_head(named: Named) -> bool:
    """Does it make logits? In BERT and T5 another module has the name `lm_head`."""
    return named.native.rpartition(".")[2] == "output_layer"


def unplaced(named: Named) -> bool:
    """Is its output made of tensors whose sizes are not known here? Linear attention's is."""
    return named.word == "attn.in_proj"


def group_of(named: Named, facts: Facts) -> Group:
    """The ranks that share a layer: experts have a tensor-parallel group of their own."""
    return facts.parallel["etp"] if named.in_expert else facts.tp


def column_cut(named: Named, facts: Facts) -> Cut:
    """How ranks share the outputs of a column-parallel layer."""
    group = group_of(named, facts)
    if gated(named, facts):
        return fused(group, (1, 1))
    if named.word == "mixer.in_proj":
        return fused(group, mixer_shares(facts.config))
    return split(group)


def _config(named: Named, facts: Facts) -> object:
    """A layer's own configuration: towers of one model, and layers of one tower, may differ."""
    return getattr(named.module, "config", None) or facts.config


def mixer_shares(config: object) -> Sequence[int]:
    """Sizes of z, x, B, C and dt in the input projection of a Mamba mixer."""
    heads = configured(config, "mamba_num_heads") or (
        2 * configured(config, "hidden_size") // configured(config, "mamba_head_dim")
    )
    inner = heads * configured(config, "mamba_head_dim")
    state = configured(config, "mamba_num_groups") * configured(config, "mamba_state_dim")
    return (inner, inner, state, state, heads)


def of_output(named: Named, facts: Facts, axis: int) -> tuple[Part, ...]:
    """What the outputs of a fused layer are; `axis` is that of the outputs."""
    parent, _, word = named.name.rpartition(".")
    if word == "qkv":
        stretches = _grouped(_config(named, facts))
        return tuple(Part(f"{parent}.{key}", axis, held) for key, held in stretches.items())
    if word == "gate_up":
        half = configured(_config(named, facts), _width_word(named))
        stretches = {"gate": ((0, half),), "up": ((half, half),)}
        return tuple(Part(f"{parent}.{key}", axis, held) for key, held in stretches.items())
    return ()


def _width_word(named: Named) -> str:
    if named.in_expert:
        return "moe_ffn_hidden_size"
    if "shared_expert" in named.name.split("."):
        return "moe_shared_expert_intermediate_size"
    return "ffn_hidden_size"


def _grouped(config: object) -> dict[str, tuple[Segment, ...]]:
    """For each group its query heads, their gates where there are any, one key, one value head."""
    groups, dim = configured(config, "num_query_groups"), configured(config, "kv_channels")
    queries = configured(config, "num_attention_heads") // groups * dim
    widths = {"q": queries, "k": dim, "v": dim}
    if getattr(config, "attention_output_gate", False):
        widths = {"q": queries, "gate": queries, "k": dim, "v": dim}
    stride, start = sum(widths.values()), 0
    found = {}
    for word, width in widths.items():
        found[word] = tuple((start + group * stride, width) for group in range(groups))
        start += width
    return found


def of_input(named: Named) -> tuple[str, ...]:
    """The modules that a fused layer stands for: its input is the input of each."""
    parent, _, word = named.name.rpartition(".")
    words = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(word, ())
    return tuple(f"{parent}.{part}" for part in words)
