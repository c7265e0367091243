"""What NxD and NxDI call a module, and what tensortap calls it on every framework.

NxDI models have the module paths of Hugging Face without the leading `model.`, and two layers
of their own around the attention projections: `self_attn.qkv_proj.q_proj`, `self_attn.o_proj`
(neuronx_distributed_inference/modules/attention/gqa.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from tensortap.names import ROOT, TensorName
from tensortap.wrappers import claim

_TOP = {"embed_tokens": "embed", "norm": "final_norm", "lm_head": "lm_head"}
_LAYER = {
    "self_attn": "attn",
    "mlp": "mlp",
    "feed_forward": "mlp",
    "block_sparse_moe": "mlp",
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_attn_norm",
    "pre_feedforward_layernorm": "pre_mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
}
_ATTENTION = {
    "qkv_proj.q_proj": "q",
    "qkv_proj.k_proj": "k",
    "qkv_proj.v_proj": "v",
    "qkv_proj.Wqkv": "qkv",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "Wqkv": "qkv",
    "o_proj.o_proj": "out",
    "o_proj": "out",
    "q_layernorm": "q_norm",
    "k_layernorm": "k_norm",
}
_MLP = {
    "gate_proj": "gate",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "act_fn": "act",
    "gate": "router",
    "router": "router",
    "shared_experts": "shared_expert",
}
_CONTEXTS: Mapping[str, Mapping[str, str]] = {
    "attn": _ATTENTION,
    "mlp": _MLP,
    "shared_expert": _MLP,
    "experts": {"act_fn": "act"},
}

_INNER = ".o_proj.o_proj"
_ATTENTION_PATH = re.compile(r"(model\.)?layers\.\d+\.self_attn")


def is_attention(path: str) -> bool:
    """Is this NxD path the attention of a decoder layer itself?"""
    return _ATTENTION_PATH.fullmatch(path) is not None


def module_name(path: str) -> str:
    """The canonical module name of an NxD path: `layers.3.self_attn` -> `layers.3.attn`.

    `model.` in front is left out, so that paths of Hugging Face models are read as well. What no
    rule knows keeps its own words.
    """
    words = path.split(".") if path else []
    if words[:1] == ["model"]:
        del words[0]
    if not words:
        return ROOT
    if words[0] != "layers" or len(words) == 1:
        return ".".join([_TOP.get(words[0], words[0]), *words[1:]])
    return ".".join([*words[:2], *_inside(words[2:])])


def _inside(words: list[str]) -> list[str]:
    """Translate a path inside of a layer; the longest known beginning comes first."""
    names: list[str] = []
    table: Mapping[str, str] = _LAYER
    while words:
        length = 2 if ".".join(words[:2]) in table else 1
        native = ".".join(words[:length])
        names.append(table.get(native, native))
        del words[:length]
        expert = table is _CONTEXTS["experts"] and names[-1].isdigit()
        table = _MLP if expert else _CONTEXTS.get(names[-1], {})
    return names


def expert_index(layer: int | None = None) -> TensorName:
    """Which experts the tokens of a layer are routed to; `None`: of all layers, as they come."""
    module = "moe" if layer is None else f"layers.{layer}.mlp.router"
    return TensorName(module, "forward", "expert_index")


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Path -> canonical name, no two equal: a module whose name is taken keeps its path."""
    known = list(paths)
    holders = {path.removesuffix(".o_proj") for path in known if path.endswith(_INNER)}
    taken: set[str] = set()
    return {
        path: claim(taken, _held(path) if path in holders else module_name(path), path)
        for path in known
    }


def _held(path: str) -> str:
    """A module that only holds the projection of its own word: the projection has the name."""
    return f"{module_name(path.rpartition('.')[0])}.{path.rpartition('.')[2]}"
