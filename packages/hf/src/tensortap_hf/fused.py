"""Which stretches of a fused projection are what: `attn.qkv` holds q, k and v.

Only layouts read in the modeling files are here. A fused projection of another family is recorded
whole, without parts: a guess would serve wrong numbers under a right name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tensortap.integration import PlacementRule
from tensortap.records import Part, Placement, Segment

Layout = Mapping[str, Sequence[Segment]]
"""Word of the part -> its stretches of the fused axis."""

_OUTPUTS = ("output", "grad_output")


def placement(name: str, module: nn.Module, config: Any) -> PlacementRule | None:
    """How the tensors of a fused module split into parts, or `None` for any other module."""
    parent, _, word = name.rpartition(".")
    if word == "experts":
        return _experts(name, module)
    layout = _LAYOUTS.get((config.model_type, word))
    if layout is None:
        return None
    return _rule(parent, layout(config), 1 if type(module).__name__ == "Conv1D" else 0)


def _rule(parent: str, layout: Layout, weight_axis: int) -> PlacementRule:
    size = sum(length for segments in layout.values() for _, length in segments)

    def rule(phase: str, tensor: str, value: torch.Tensor) -> Placement | None:
        axis = {"weight": weight_axis, "bias": 0}.get(tensor, -1)
        if axis < 0 and tensor not in _OUTPUTS:
            return None
        return _placed(parent, layout, size, axis, value)

    return rule


def _placed(
    parent: str, layout: Layout, size: int, axis: int, value: torch.Tensor
) -> Placement | None:
    axis %= value.dim()
    if value.shape[axis] != size:  # Not the tensor we think it is; no parts.
        return None
    parts = tuple(Part(f"{parent}.{word}", axis, tuple(found)) for word, found in layout.items())
    return Placement(logical_shape=tuple(value.shape), parts=parts)


def _experts(name: str, module: nn.Module) -> PlacementRule | None:
    """Stacked experts: gate above up, unless the two alternate row by row."""
    weight = dict(module.named_parameters(recurse=False)).get("gate_up_proj")
    if weight is None or weight.dim() != 3 or not getattr(module, "is_concatenated", False):
        return None
    axis = 2 if getattr(module, "is_transposed", False) else 1
    layout = _stacked(gate=weight.shape[axis] // 2, up=weight.shape[axis] // 2)

    def rule(phase: str, tensor: str, value: torch.Tensor) -> Placement | None:
        if tensor != "gate_up_proj":
            return None
        return _placed(name, layout, weight.shape[axis], axis, value)

    return rule


def _stacked(**sizes: int) -> Layout:
    """One part after the other."""
    layout, start = {}, 0
    for word, size in sizes.items():
        layout[word] = [(start, size)]
        start += size
    return layout


def _grouped(groups: int, queries: int, dim: int) -> Layout:
    """`groups` times: the heads of `queries` queries, of one key, of one value."""
    starts = [group * (queries + 2) * dim for group in range(groups)]
    return {
        "q": [(start, queries * dim) for start in starts],
        "k": [(start + queries * dim, dim) for start in starts],
        "v": [(start + (queries + 1) * dim, dim) for start in starts],
    }


def _head(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _rows(config: Any) -> Layout:
    """All queries, then all keys, then all values."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    return _stacked(q=heads * _head(config), k=kv * _head(config), v=kv * _head(config))


def _per_head(config: Any) -> Layout:
    """Query, key and value of head 0, then of head 1, and so on."""
    return _grouped(config.num_attention_heads, 1, _head(config))


def _falcon(config: Any) -> Layout:
    heads = config.num_attention_heads
    if config.new_decoder_architecture:
        return _grouped(config.num_kv_heads, heads // config.num_kv_heads, _head(config))
    return _grouped(1, heads, _head(config)) if config.multi_query else _per_head(config)


def _gpt_bigcode(config: Any) -> Layout:
    heads = config.num_attention_heads
    return _grouped(1, heads, _head(config)) if config.multi_query else _per_head(config)


def _gate_up(config: Any) -> Layout:
    return _stacked(gate=config.intermediate_size, up=config.intermediate_size)


_LAYOUTS: Mapping[tuple[str, str], Callable[[Any], Layout]] = {
    ("gpt2", "qkv"): _rows,
    ("phi3", "qkv"): _rows,
    ("phi3", "gate_up"): _gate_up,
    ("gpt_neox", "qkv"): _per_head,
    ("bloom", "qkv"): _per_head,
    ("falcon", "qkv"): _falcon,
    ("gpt_bigcode", "qkv"): _gpt_bigcode,
}
