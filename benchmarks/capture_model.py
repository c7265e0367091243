"""The model every lane of the capture benchmark trains: an 8-layer Llama shape, on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

BATCH, TOKENS, VOCABULARY = 4, 256, 8000


def build_model() -> nn.Module:
    """Hidden 512, 8 layers, 8 heads, 32 million parameters in float32; the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=TOKENS,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def training_step(model: nn.Module) -> Callable[[], None]:
    """One forward, backward and AdamW step on the same 4 x 256 tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
