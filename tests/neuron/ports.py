"""A small Llama, runs of it in every precision, and ports of it with a fault in one layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tensortap
from tensortap_analysis import RunComparison, compare
from tensortap_neuron.command.naming import places_of

transformers.logging.set_verbosity_error()

DEPTH = 6
TOKENS = torch.tensor([list(b"The capital of France is Paris, and that of Italy")])
SHAPE = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": DEPTH, "initializer_range": 0.05,
}  # fmt: skip

Fault = Callable[[nn.Module], None]
"""Breaks one decoder layer, in place."""


def llama(attention: str = "sdpa", **changes: object) -> LlamaForCausalLM:
    """The same weights every time; `eager` attention rounds in another order than `sdpa`."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, **changes}, attn_implementation=attention)
    return LlamaForCausalLM(config).eval()


def port(device: torch.device, dtype: torch.dtype, layer: int, fault: Fault | None) -> nn.Module:
    """The model as another machine runs it, with a fault in one layer."""
    model = llama("eager").to(dtype)
    if fault is not None:
        with torch.no_grad():
            fault(model.model.layers[layer])
    return model.to(device)


def perturbed(by: float) -> Fault:
    """One weight of the MLP is wrong."""

    def fault(layer: nn.Module) -> None:
        layer.mlp.down_proj.weight[3, 7] += by

    return fault


def poisoned(layer: nn.Module) -> None:
    """One weight of the MLP is NaN, which reaches one feature of every token."""
    layer.mlp.down_proj.weight[3, 7] = float("nan")


def in_bf16(layer: nn.Module) -> None:
    """The layer computes in bf16 in a model that does not."""
    layer.to(torch.bfloat16)
    whole = type(layer).forward

    def forward(self, hidden_states, position_embeddings=None, **rest):
        turned = tuple(one.bfloat16() for one in position_embeddings)
        made = whole(self, hidden_states.bfloat16(), position_embeddings=turned, **rest)
        return made.to(hidden_states.dtype)

    layer.forward = MethodType(forward, layer)


def capture(model: nn.Module, run: Path) -> Path:
    """One forward, every layer's output."""
    device = next(model.parameters()).device
    names = ",".join(place.name for place in places_of(model))
    with tensortap.attach(
        model, run, select=names, values="full", phases=("forward",), on_error="raise"
    ):
        with torch.no_grad():
            model(input_ids=TOKENS.to(device), use_cache=True)
    return run


@dataclass(frozen=True)
class Trusted:
    """The reference, and the noise that a port of `dtype` must be allowed."""

    dtype: torch.dtype
    ref: Path
    noise: Path

    @classmethod
    def made(cls, dtype: torch.dtype, folder: Path) -> Trusted:
        """A reference of twice the precision on the CPU, and the port's precision there."""
        wider = {torch.bfloat16: torch.float32, torch.float32: torch.float64}[dtype]
        return cls(
            dtype,
            capture(llama().to(wider), folder / "ref"),
            capture(llama().to(dtype), folder / "noise"),
        )

    def judge(self, run: Path) -> RunComparison:
        """The three-way comparison."""
        return compare(self.ref, run, noise=self.noise).runs[0]
