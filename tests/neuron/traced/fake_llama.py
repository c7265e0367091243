"""A Llama on the fake NxD layers, with the modules and paths that NxDI gives it.

After neuronx_distributed_inference/models/llama/modeling_llama.py and modules/attention/gqa.py
(release 2.29). The arithmetic is that of transformers' Llama, whose weights it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from tests.neuron.traced.fake_nxd import (
    ColumnParallelLinear,
    FakeGroup,
    ParallelEmbedding,
    RowParallelLinear,
    gathered,
    scattered,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

KERNELS = (
    "qkv_kernel_enabled",
    "qkv_kernel_fuse_residual_add",
    "mlp_kernel_enabled",
    "mlp_kernel_fuse_residual_add",
)
"""Flags of a NeuronConfig."""


def tiny_config(**more: Any) -> LlamaConfig:
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(**{**sizes, **more}, attn_implementation="eager", tie_word_embeddings=False)


def huggingface(seed: int = 0, **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config(**more)).eval()


class FakeQKV(nn.Module):
    """GroupQueryAttention_QKV, with key heads replicated to one for each rank."""

    def __init__(self, config, neuron, group) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self._src_num_attention_heads = self.num_attention_heads = config.num_attention_heads
        self._src_num_key_value_heads = config.num_key_value_heads
        self.num_key_value_heads = max(config.num_key_value_heads, group.size())
        self.sharding_strategy = SimpleNamespace(name="REPLICATE_TO_TP_DEGREE")
        more = {"gather_output": False, "group": group}
        width = self.head_dim
        self.q_proj = ColumnParallelLinear(
            config.hidden_size, self.num_attention_heads * width, **more
        )
        self.k_proj = ColumnParallelLinear(
            config.hidden_size, self.num_key_value_heads * width, **more
        )
        self.v_proj = ColumnParallelLinear(
            config.hidden_size, self.num_key_value_heads * width, **more
        )

    def load(self, theirs) -> None:
        self.q_proj.load(theirs.q_proj.weight.data)
        repeats = self.num_key_value_heads // self._src_num_key_value_heads
        for mine, whole in ((self.k_proj, theirs.k_proj), (self.v_proj, theirs.v_proj)):
            heads = whole.weight.data.view(-1, self.head_dim, whole.weight.shape[1])
            mine.load(heads.repeat_interleave(repeats, 0).flatten(0, 1))

    def forward(self, hidden_states):
        return (
            self.q_proj(hidden_states),
            self.k_proj(hidden_states),
            self.v_proj(hidden_states),
            None,
        )


class FakeO(nn.Module):
    """GroupQueryAttention_O."""

    def __init__(self, config, neuron, group) -> None:
        super().__init__()
        self.o_proj = RowParallelLinear(
            config.hidden_size, config.hidden_size, group=group, sequence_dimension=1,
            sequence_parallel_enabled=neuron.sequence_parallel_enabled,
        )  # fmt: skip

    def forward(self, value):
        return self.o_proj(value)


@dataclass(frozen=True)
class FakeAttentionOutput:
    """attention_base.py, NeuronAttentionBaseOutput: fields, which unpack like four of a tuple."""

    hidden_states: Any
    present_key_value: Any
    cos_cache: Any = None
    sin_cache: Any = None
    residual: Any = None
    attn_input_hidden_states: Any = None

    def __iter__(self):
        return iter([self.hidden_states, self.present_key_value, self.cos_cache, self.sin_cache])

    def __getitem__(self, place):
        return getattr(self, fields(self)[place].name)


class FakeCache:
    """KVCacheManager: keys and values of one layer, no part of the layer's own state."""

    kept: tuple[torch.Tensor, torch.Tensor]

    def __copy__(self) -> FakeCache:
        return self


class FakeAttention(nn.Module):
    """NeuronAttentionBase: gathers the sequence, keeps keys and values, one row at a time."""

    def __init__(self, config, neuron, group) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = FakeQKV(config, neuron, group), FakeO(config, neuron, group)
        self.split, self.group = neuron.sequence_parallel_enabled, group
        self.width = self.qkv_proj.head_dim
        self.cache = FakeCache()

    def forward(self, hidden_states, rmsnorm=None, residual=None, rotary=None, length=0):
        if residual is not None:
            hidden_states = residual = hidden_states + residual
        if rmsnorm is not None:  # The kernel takes its weight; the module itself is not called.
            hidden_states = type(rmsnorm).forward(rmsnorm, hidden_states)
        if self.split and length == 0:
            hidden_states = gathered(hidden_states, 1, self.group)
        q, k, v, _ = self.qkv_proj(hidden_states)
        rows, tokens = q.shape[:2]
        q, k, v = (x.view(rows, tokens, -1, self.width).transpose(1, 2) for x in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        if length:
            k, v = (
                torch.cat([old[:, :, :length], new], 2)
                for old, new in zip(self.cache.kept, (k, v), strict=True)
            )
        self.cache.kept = k, v
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * self.width**-0.5
        if not length:
            scores = scores + torch.full((tokens, tokens), float("-inf")).triu(1)
        context = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        attended = self.o_proj(context.transpose(1, 2).reshape(rows, tokens, -1))
        return FakeAttentionOutput(attended, self.cache.kept, *rotary, residual)


class FakeMLP(nn.Module):
    """NeuronLlamaMLP."""

    def __init__(self, config, neuron, group) -> None:
        super().__init__()
        more = {"group": group, "sequence_dimension": 1}
        more["sequence_parallel_enabled"] = neuron.sequence_parallel_enabled
        wide, narrow = config.intermediate_size, config.hidden_size
        self.gate_proj = ColumnParallelLinear(narrow, wide, gather_output=False, pad=True, **more)
        self.up_proj = ColumnParallelLinear(narrow, wide, gather_output=False, pad=True, **more)
        self.down_proj = RowParallelLinear(wide, narrow, pad=True, **more)
        self.act_fn = nn.SiLU()

    def forward(self, x, rmsnorm=None, residual=None):
        if residual is not None:
            x = residual = x + residual
        if rmsnorm is not None:
            x = type(rmsnorm).forward(rmsnorm, x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), residual


class FakeDecoderLayer(nn.Module):
    """NeuronLlamaDecoderLayer: a tuple whose last part is a residual that was not added yet.

    `qkv_kernel_enabled` and `mlp_kernel_enabled` hand the norm over, uncalled.
    """

    def __init__(self, config, neuron, group) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = FakeAttention(config, neuron, group)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FakeMLP(config, neuron, group)
        self.split = neuron.sequence_parallel_enabled
        self.qkv_kernel, self.qkv_adds, self.mlp_kernel, self.mlp_adds = (
            getattr(neuron, flag, False) for flag in KERNELS
        )

    def forward(self, hidden_states, residual=None, length=0, **more):
        entry, apart = hidden_states, self.split and not length
        norm = self.input_layernorm if self.qkv_kernel and not apart else None
        if norm is None:
            hidden_states = self.input_layernorm(hidden_states)
        attended = self.self_attn(
            hidden_states=hidden_states, rmsnorm=norm, residual=residual, length=length, **more
        )
        residual = entry if attended.residual is None else attended.residual
        hidden_states, norm = attended.hidden_states, self.post_attention_layernorm
        if self.mlp_kernel and self.mlp_adds:
            hidden_states, residual = self.mlp(hidden_states, rmsnorm=norm, residual=residual)
        else:
            hidden_states = residual = residual + hidden_states
            if not self.mlp_kernel or apart:
                hidden_states, norm = norm(hidden_states), None
            hidden_states, _ = self.mlp(hidden_states, rmsnorm=norm)
        kept = (attended.present_key_value, attended.cos_cache, attended.sin_cache)
        if not self.qkv_adds or length:
            return hidden_states + residual, *kept, None
        return hidden_states, *kept, residual


class FakeNeuronLlama(nn.Module):
    """NeuronLlamaModel: logits of the last position only, while the context is encoded."""

    def __init__(self, config, neuron, group=None) -> None:
        super().__init__()
        group = group or FakeGroup()
        self.config, self.neuron, self.group = config, neuron, group
        self.sequence_parallel_enabled = neuron.sequence_parallel_enabled
        self.sequence_dimension = 1
        self.embed_tokens = ParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            group=group,
            shard_across_embedding=True,
            pad=True,
            sequence_parallel_enabled=neuron.sequence_parallel_enabled,
            sequence_dimension=1,
        )
        self.layers = nn.ModuleList(
            FakeDecoderLayer(config, neuron, group) for _ in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        sampled = neuron.on_device_sampling_config is not None
        self.lm_head = ColumnParallelLinear(
            config.hidden_size, config.vocab_size, gather_output=not sampled, group=group, pad=True
        )
        self.rotary = LlamaRotaryEmbedding(config)

    def load(self, theirs: LlamaForCausalLM) -> FakeNeuronLlama:
        """Take the weights of the Hugging Face model, this rank's piece of each."""
        self.embed_tokens.load(theirs.model.embed_tokens.weight.data)
        self.norm.load_state_dict(theirs.model.norm.state_dict())
        self.lm_head.load(theirs.lm_head.weight.data)
        for mine, layer in zip(self.layers, theirs.model.layers, strict=True):
            mine.input_layernorm.load_state_dict(layer.input_layernorm.state_dict())
            mine.post_attention_layernorm.load_state_dict(
                layer.post_attention_layernorm.state_dict()
            )
            mine.self_attn.qkv_proj.load(layer.self_attn)
            mine.self_attn.o_proj.o_proj.load(layer.self_attn.o_proj.weight.data)
            for word in ("gate_proj", "up_proj", "down_proj"):
                getattr(mine.mlp, word).load(getattr(layer.mlp, word).weight.data)
        return self.eval()

    @torch.no_grad()
    def forward(self, input_ids, attention_mask, position_ids):
        prefill = int(position_ids.min()) == 0
        split = self.sequence_parallel_enabled and prefill
        length = 0 if prefill else int(position_ids.max())
        hidden = self.embed_tokens(input_ids)
        rotary = self.rotary(hidden, position_ids)
        if split:
            hidden = scattered(hidden, 1, self.group)
        residual = None
        for layer in self.layers:
            hidden, _, _, _, residual = layer(
                hidden, residual=residual, rotary=rotary, length=length
            )
        if residual is not None:
            hidden = hidden + residual
        hidden = self.norm(hidden)
        if split:
            hidden = gathered(hidden, 1, self.group)
        if prefill:
            last = (
                position_ids.max(1, keepdim=True).indices[..., None].expand(-1, 1, hidden.shape[-1])
            )
            hidden = hidden.gather(1, last)
        return (
            gathered(self.lm_head(hidden), -1, self.group)
            if not self.lm_head.gather_output
            else self.lm_head(hidden)
        )
