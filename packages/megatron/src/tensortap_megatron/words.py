"""The words of Megatron-core and what tensortap calls them, as dotted paths below their context."""

from __future__ import annotations

from collections.abc import Mapping

Words = Mapping[str, str]

TOP: Words = {
    "embedding.word_embeddings": "embed",
    "embedding.position_embeddings": "embed.position",
    "embedding.tokentype_embeddings": "embed.token_type",
    "output_layer": "lm_head",
}
"""Outside of the block of layers."""

BLOCK: Words = {"final_layernorm": "final_norm", "final_norm": "final_norm"}
"""In the block of layers, next to them."""

EDGES = frozenset({"embedding", "embed", "decoder", "final_norm", "lm_head"})
"""What each tower of a model has of its own, outside of the layers."""

LAYER: Words = {
    "input_layernorm": "input_norm",
    "self_attention": "attn",
    "cross_attention": "cross_attn",
    "pre_cross_attn_layernorm": "cross_attn_norm",
    "pre_mlp_layernorm": "post_attn_norm",
    "mlp": "mlp",
    "mixer": "mixer",
    "norm": "norm",
}

ATTENTION: Words = {
    "linear_qkv": "qkv",
    "linear_q": "q",
    "linear_kv": "kv",
    "linear_q_proj": "q",
    "linear_proj": "out",
    "core_attention": "core",
    "q_layernorm": "q_norm",
    "k_layernorm": "k_norm",
    "kv_layernorm": "kv_norm",
}

MLP: Words = {
    "linear_fc1": "up",
    "linear_fc2": "down",
    "activation_func": "act",
    "router": "router",
    "experts": "experts",
    "shared_experts": "shared_expert",
}

MIXER: Words = {"conv1d": "conv"}

CONTEXTS: Mapping[str, Words] = {
    "attn": ATTENTION,
    "cross_attn": ATTENTION,
    "mlp": MLP,
    "shared_expert": MLP,
    "experts": MLP,
    "expert": MLP,
    "mixer": MIXER,
}
"""Canonical word -> the words below it."""

FUSED_NORMS: Words = {
    "linear_qkv": "input_norm",
    "linear_fc1": "post_attn_norm",
    "in_proj": "norm",
    "linear_q_up_proj": "attn.q_norm",
    "linear_kv_up_proj": "attn.kv_norm",
}
"""Linear layers that Transformer Engine fuses a norm into -> what that is, below the layer."""

GATED = {"up": "gate_up"}
"""What `linear_fc1` is when it holds the gate too."""
