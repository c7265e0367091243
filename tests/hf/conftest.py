"""Small real models of every family, and what capturing one step of them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tensortap

transformers.logging.set_verbosity_error()

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_HEADED = {**_GROUPED, "head_dim": 8}
_MAMBA = {k: v for k, v in _SMALL.items() if "attention" not in k and "position" not in k}
_GPT2 = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Family: model class, configuration class, arguments.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", _HEADED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _HEADED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _HEADED),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_HEADED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_HEADED, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _SMALL),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_HEADED, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _SMALL),
    "mamba": ("MambaForCausalLM", "MambaConfig", {**_MAMBA, "state_size": 4}),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**_MAMBA, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    ),
}
"""The families that are promised by name."""

OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bloom": ("BloomForCausalLM", "BloomConfig", {**_SMALL, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", "FalconConfig", _SMALL),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT2),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_HEADED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _SMALL),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
        | {"decoder_start_token_id": 0},
    ),
    "falcon_mamba": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {**_MAMBA, "state_size": 4},
    ),
}
"""Families that fall out of the same rules."""

MIXERS = ("mamba", "mamba2")
ATTENTION = tuple(family for family in FAMILIES if family not in MIXERS)
IMPLEMENTATIONS = [
    (family, implementation)
    for family in ATTENTION
    for implementation in ("eager", "sdpa")
    if (family, implementation) != ("gemma2", "sdpa")  # Refused by transformers itself.
]

Build = Callable[..., nn.Module]


def _build(family: str, implementation: str | None = None, **changes: Any) -> nn.Module:
    """A small model of a family with random weights; `changes` go to its configuration."""
    model_class, config_class, arguments = (FAMILIES | OTHERS)[family]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    if implementation is not None:
        config._attn_implementation = implementation
    torch.manual_seed(1)
    model: nn.Module = getattr(transformers, model_class)(config)
    return model


def _inputs(length: int = 7, batch: int = 2) -> dict[str, torch.Tensor]:
    """Token ids, as input and as labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (batch, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


class Captured:
    """What a `MemorySink` holds, by name."""

    def __init__(self, sink: tensortap.MemorySink) -> None:
        self.sink = sink

    def __call__(self, name: str, index: int = 0) -> torch.Tensor:
        """The payload of the `index`-th record of a name."""
        found = self.sink.find(name)
        assert found, f"{name} was not captured"
        payload = found[index][1]
        assert payload is not None
        return payload

    def has(self, name: str) -> bool:
        """Was this name captured?"""
        return bool(self.sink.find(name))

    def notes(self) -> dict[str, str]:
        """Name -> reason of every coverage note."""
        assert self.sink.coverage is not None
        return {row["name"]: row["reason"] for row in self.sink.coverage["notes"]}


def _capture(model: nn.Module, *, backward: bool = True, **options: Any) -> Captured:
    """Everything in one step of a model in training mode."""
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise", **options):
        loss = model(**_inputs()).loss
        if backward:
            loss.backward()
    return Captured(sink)


@pytest.fixture
def build() -> Build:
    return _build


@pytest.fixture
def inputs() -> Callable[..., dict[str, torch.Tensor]]:
    return _inputs


@pytest.fixture
def capture() -> Callable[..., Captured]:
    return _capture


@pytest.fixture
def captured() -> type[Captured]:
    return Captured


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family`: each promised family; `attention_family`, `mixer`: those with such a part."""
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize(("attention_family", "implementation"), IMPLEMENTATIONS)
        return
    for argument, families in (
        ("family", tuple(FAMILIES)),
        ("any_family", (*FAMILIES, *OTHERS)),
        ("attention_family", ATTENTION),
        ("mixer", MIXERS),
    ):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, families)
