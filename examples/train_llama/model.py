"""A Llama as Megatron-core's GPTModel: its sizes, its configuration, one pipeline stage of it."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_APEX,
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""What the parameters are; fp8 is the format of Transformer Engine's products only."""


@dataclass(frozen=True)
class Llama:
    """The sizes of a model, as Hugging Face's config.json names them."""

    num_hidden_layers: int = 4
    hidden_size: int = 128
    intermediate_size: int = 384
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int = 256
    head_dim: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float | None = None
    """Llama 3's scaling of the rotary frequencies, for contexts beyond 8192 tokens."""
    tie_word_embeddings: bool = True

    @classmethod
    def from_folder(cls, folder: Path) -> Llama:
        """From a Hugging Face folder; raises `ValueError` for what is not built here."""
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != "llama":
            raise ValueError(f"{folder} holds a {config.get('model_type')} model, not a Llama.")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError(f"{folder}: biases are not built here.")
        # transformers 5 writes rope_parameters; older versions rope_scaling and rope_theta.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        theta = rope.get("rope_theta", config.get("rope_theta", cls.rope_theta))
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        known |= {"rope_theta": theta, "rope_factor": _llama3_factor(rope, folder)}
        # What config.json leaves out is Hugging Face's default, not this class's.
        known.setdefault("tie_word_embeddings", False)
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        known.setdefault("rms_norm_eps", 1e-6)
        return cls(**known)


def _llama3_factor(rope: dict[str, Any], folder: Path) -> float | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    # Megatron has these three built in and takes only the factor.
    built_in = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if kind != "llama3" or any(rope.get(name) != value for name, value in built_in.items()):
        raise ValueError(f"{folder}: Megatron has no rotary embedding like {rope}.")
    return float(rope["factor"])


SIZES = {
    "tiny": Llama(),
    "small": Llama(8, 512, 1536, 8, 4),
    # Llama-3.2-1B
    "1b": Llama(
        num_hidden_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        rope_theta=500000.0,
        rope_factor=32.0,
    ),
}


def choose_model(options: Namespace) -> Llama:
    """The sizes asked for; raises `ValueError` where they cannot be cut as asked."""
    llama = Llama.from_folder(options.hf_model) if options.hf_model else SIZES[options.size]
    if llama.num_attention_heads % options.tp or llama.intermediate_size % options.tp:
        raise ValueError(
            f"--tp {options.tp} does not divide {llama.num_attention_heads} heads and an MLP of "
            f"{llama.intermediate_size}."
        )
    if llama.num_hidden_layers % options.pp:
        raise ValueError(f"--pp {options.pp} does not divide {llama.num_hidden_layers} layers.")
    return llama


def choose_spec(options: Namespace) -> str:
    """`local` or `te`; raises `ValueError` where Transformer Engine is asked for and missing."""
    gpu = torch.cuda.is_available()
    usable = HAVE_TE and gpu
    spec = options.spec or ("te" if usable else "local")
    if spec == "te" and not usable:
        raise ValueError("--spec te needs a GPU and Transformer Engine; --spec local does not.")
    if options.dtype == "fp8" and spec != "te":
        raise ValueError("--dtype fp8 needs a GPU and Transformer Engine: try --dtype bf16.")
    if (
        gpu
        and spec == "local"
        and (options.cp > 1 or (options.sequence_parallel and not HAVE_APEX))
    ):
        # Without a GPU, run_on_cpu stands in for both.
        raise ValueError("--cp and --sequence-parallel need Transformer Engine on GPUs: --spec te.")
    return spec


def make_config(llama: Llama, options: Namespace) -> TransformerConfig:
    dtype = DTYPES[options.dtype]
    return TransformerConfig(
        num_layers=llama.num_hidden_layers,
        hidden_size=llama.hidden_size,
        ffn_hidden_size=llama.intermediate_size,
        num_attention_heads=llama.num_attention_heads,
        num_query_groups=llama.num_key_value_heads,
        kv_channels=llama.head_dim or llama.hidden_size // llama.num_attention_heads,
        layernorm_epsilon=llama.rms_norm_eps,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        context_parallel_size=options.cp,
        sequence_parallel=options.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        fp8="hybrid" if options.dtype == "fp8" else None,
        # The weights are drawn whole and then cut: they do not depend on --tp, nor on the device.
        use_cpu_initialization=True,
        # Fused kernels come with Apex and hide from a tap what they compute.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )


def build_stage(llama: Llama, config: TransformerConfig, spec: str, seq_length: int) -> GPTModel:
    """One pipeline stage, this rank's; the whole model without pipeline parallelism."""
    layer = (
        get_gpt_layer_with_transformer_engine_spec()
        if spec == "te"
        else get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    stage = GPTModel(
        config,
        layer,
        vocab_size=padded(llama.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=llama.rope_theta,
        rope_scaling=llama.rope_factor is not None,
        rope_scaling_factor=llama.rope_factor or 1.0,
        share_embeddings_and_output_weights=llama.tie_word_embeddings,
    )
    # Megatron keeps only the padded size; from this tensortap knows which rows are padding.
    stage.unpadded_vocab_size = llama.vocab_size
    return stage


def padded(vocab_size: int, tp: int) -> int:
    """Rows of the embedding: no more padding than `tp` needs, so that it rarely has any."""
    return -(-vocab_size // tp) * tp
