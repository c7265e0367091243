"""Key and value projections whose heads NxDI replicates to have one for every rank.

`GroupQueryAttention_QKV` of neuronx_distributed_inference/modules/attention/gqa.py: with fewer
key heads than ranks and `REPLICATE_TO_TP_DEGREE`, rank r holds head r // (ranks / heads) of the
checkpoint's. Query heads that do not divide are padded in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensortap.records import Placement
from tensortap_neuron.traced.layers import Group


@dataclass(frozen=True, slots=True)
class Heads:
    """How many heads the checkpoint has of what a projection makes, and their width.

    `source` is `None` where padding or another strategy moved them about.
    """

    source: int | None
    width: int

    def place(self, shape: tuple[int, ...], axis: int, group: Group) -> Placement:
        """The one head that a rank holds, among those of the checkpoint."""
        if self.source is None or shape[axis] != self.width:
            return Placement(unknown=True)
        head = group.rank // (group.size // self.source)
        logical = (*shape[:axis], self.source * self.width, *shape[axis + 1 :])
        return Placement(logical, {axis: ((head * self.width, self.width),)})


def replicated(model: nn.Module) -> Mapping[nn.Module, Heads]:
    """Every projection of the model whose heads are not those of the checkpoint, one by one."""
    found: dict[nn.Module, Heads] = {}
    for module in model.modules():
        if hasattr(module, "_src_num_key_value_heads") and hasattr(module, "head_dim"):
            found.update(_moved(module))
    return found


def _moved(attention: Any) -> Mapping[nn.Module, Heads]:
    queries = attention._src_num_attention_heads, attention.num_attention_heads
    keys = attention._src_num_key_value_heads, attention.num_key_value_heads
    found: dict[nn.Module, Heads] = {}
    if queries[0] != queries[1]:
        found |= _each(attention, ("q_proj", "o_proj", "Wqkv"), Heads(None, attention.head_dim))
    if keys[0] != keys[1]:
        replicates = getattr(attention.sharding_strategy, "name", "") == "REPLICATE_TO_TP_DEGREE"
        source = keys[0] if replicates else None
        found |= _each(attention, ("k_proj", "v_proj"), Heads(source, attention.head_dim))
        found |= _each(attention, ("Wqkv",), Heads(None, attention.head_dim))
    return found


def _each(owner: nn.Module, words: tuple[str, ...], heads: Heads) -> Mapping[nn.Module, Heads]:
    return {owner._modules[w]: heads for w in words if isinstance(owner._modules.get(w), nn.Module)}  # type: ignore[misc]
