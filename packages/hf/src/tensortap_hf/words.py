"""The words of transformers models and what tensortap calls them.

Each table maps canonical words to the native ones, as dotted paths below their context: `TOP` is
outside of the layers, `LAYER` inside of one, the others below the canonical word they are named
after. A new family that uses known words needs nothing; else it adds its words here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Words = Mapping[str, str]

LISTS = frozenset({"layers", "h", "layer", "block", "blocks"})
"""What the list of layers is called."""

CONTAINERS = frozenset({"model", "transformer", "decoder", "encoder", "backbone", "language_model"})
"""Modules around the layers that add nothing to a name; so does a model's `base_model_prefix`."""


def _native(table: Words) -> dict[str, str]:
    """Turn `canonical -> "native native"` around."""
    return {native: name for name, natives in table.items() for native in natives.split()}


TOP = _native(
    {
        "embed": "embed_tokens wte embed_in word_embeddings embeddings.word_embeddings shared",
        "embed.position": "wpe embed_positions position_embeddings embeddings.position_embeddings",
        "embed.token_type": "embeddings.token_type_embeddings",
        "embed.norm": "embeddings.LayerNorm word_embeddings_layernorm layernorm_embedding",
        "embed.dropout": "embeddings.dropout",
        "final_norm": "norm ln_f norm_f final_layer_norm final_layernorm final_norm layer_norm "
        "embedding_norm",
        "lm_head": "lm_head embed_out cls.predictions vocab_projector proj_out output_projection "
        "generator_lm_head",
    }
)

LAYER = _native(
    {
        "attn": "self_attn self_attention attention attn layer.0.SelfAttention",
        "cross_attn": "crossattention encoder_attn layer.1.EncDecAttention",
        "mlp": "mlp ffn feed_forward block_sparse_moe layer.1.DenseReluDense "
        "layer.2.DenseReluDense",
        "mixer": "mixer mamba linear_attn",
        "input_norm": "input_layernorm ln_1 self_attn_layer_norm layernorm_before norm1 "
        "layer.0.layer_norm",
        "post_attn_norm": "post_attention_layernorm ln_2 final_layer_norm layernorm_after norm2 "
        "attention.output.LayerNorm sa_layer_norm",
        "pre_mlp_norm": "pre_feedforward_layernorm pre_ff_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm output.LayerNorm output_layer_norm",
        "cross_attn_norm": "ln_cross_attn encoder_attn_layer_norm",
        "mlp.up": "fc1 intermediate.dense",
        "mlp.act": "activation_fn intermediate.intermediate_act_fn",
        "mlp.down": "fc2 output.dense",
    }
)

INNER = ("self", "attention")
"""A module inside of `attn` that does its work: BERT and its kin have the projections there."""

_ATTENTION = _native(
    {
        "q": "q_proj query q_lin q_attn q wq",
        "k": "k_proj key k_lin k wk",
        "v": "v_proj value v_lin v wv",
        "qkv": "c_attn query_key_value qkv_proj Wqkv qkv",
        "out": "o_proj out_proj c_proj dense out_lin output.dense o wo",
        "q_norm": "q_norm q_layernorm",
        "k_norm": "k_norm k_layernorm",
    }
)
ATTENTION = _ATTENTION | {
    f"{inner}.{native}": name for native, name in _ATTENTION.items() for inner in INNER
}

MLP = _native(
    {
        "gate": "gate_proj w1 wi_0",
        "up": "up_proj c_fc dense_h_to_4h fc1 lin1 w3 wi wi_1",
        "gate_up": "gate_up_proj",
        "down": "down_proj c_proj dense_4h_to_h fc2 lin2 w2 wo",
        "act": "act act_fn activation activation_fn gelu_impl",
        "router": "gate router",
        "shared_expert": "shared_expert shared_experts",
    }
)

# The name `mixer.conv` belongs to the function tap; a module of that name steps aside.
MIXER = {"conv": "conv1d"}

CONTEXTS: Mapping[str, Words] = {
    "attn": ATTENTION,
    "cross_attn": ATTENTION,
    "mlp": MLP,
    "shared_expert": MLP,
    "experts": {"act_fn": "act"},
    "expert": MLP,
    "mixer": MIXER,
}

_POST_NORM = {"self_attn_layer_norm": "post_attn_norm", "final_layer_norm": "post_mlp_norm"}

FAMILIES: tuple[tuple[Callable[[Any], bool], Words], ...] = (
    # These normalise after the residual addition, under names that others use before it.
    (lambda config: not getattr(config, "do_layer_norm_before", True), _POST_NORM),
    (lambda config: config.model_type in ("bart", "blenderbot-small", "marian"), _POST_NORM),
    (lambda config: config.model_type.startswith("lfm"), {"conv": "mixer"}),
)
"""What a family says differently inside its layers: (does it apply, its words)."""


def layer_words(config: Any) -> Words:
    """The words of the layers of a model with this configuration."""
    words = dict(LAYER)
    for applies, differently in FAMILIES:
        if applies(config):
            words.update(differently)
    return words
