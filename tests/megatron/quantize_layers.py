"""Megatron layers and models of the quantisation tests; as a script, one rank of two.

Everything runs in float64, where the order of summation does not hide a wrong operand.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from examples.train_llama.cpu import CPU_CONFIG, run_on_cpu
from torch import distributed, nn
from torch.nn import functional

SEQ, BATCH, IN, OUT = 24, 3, 128, 192
"""72 tokens: the last block of 32 is short. Half of IN and OUT are multiples of a block."""
LAYERS = ("column", "row", "frozen")


@contextlib.contextmanager
def ranks(tensor: int = 1) -> Iterator[None]:
    """Megatron's process groups, of this one process or of those torchrun started."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, about what is not installed.
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    alone = "RANK" not in os.environ and not distributed.is_initialized()
    with run_on_cpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if alone:
            store = distributed.HashStore()
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        elif not distributed.is_initialized():
            distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor)
        model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            if alone:
                distributed.destroy_process_group()


def config(**changes: Any) -> Any:
    """A small Llama without dropout."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        **CPU_CONFIG,
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**{**settings, **changes})


def gpt(seed: int = 0, *, tied: bool = False, **changes: Any) -> Any:
    """A model of 256 tokens with rotary embeddings; `changes` to its configuration."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(seed)
    settings = config(**changes)
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", num_experts=settings.num_moe_experts, moe_grouped_gemm=False
    )
    return GPTModel(
        settings,
        spec,
        vocab_size=256,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )


def batch(seq: int = 40, count: int = 2) -> dict[str, Any]:
    """The same tokens every time."""
    tokens = torch.randint(0, 256, (count, seq + 1), generator=torch.Generator().manual_seed(3))
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(seq).expand(count, seq),
        # A causal mask is made for the GPU where none is given, also when backward recomputes.
        "attention_mask": torch.ones(1, 1, seq, seq).triu(1).bool(),
    }


def gradients(model: nn.Module, **inputs: Any) -> dict[str, torch.Tensor]:
    """One forward and backward: the losses of the tokens and every gradient."""
    model.zero_grad()
    losses = model(**(inputs or batch()))
    losses.float().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": losses.detach(), **found}


def layers(*, tensor: int, sequence_parallel: bool) -> nn.ModuleDict:
    """One linear layer of each kind, with this rank's shard of the same weights."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    settings = config(tensor_model_parallel_size=tensor, sequence_parallel=sequence_parallel)
    common = {"config": settings, "init_method": nn.init.normal_, "skip_bias_add": False}
    built = nn.ModuleDict(
        {
            "column": ColumnParallelLinear(IN, OUT, bias=True, gather_output=False, **common),
            "row": RowParallelLinear(IN, OUT, bias=True, input_is_parallel=True, **common),
            "frozen": ColumnParallelLinear(IN, OUT, bias=False, gather_output=False, **common),
        }
    ).double()
    built["frozen"].weight.requires_grad_(False)
    for name, layer in built.items():
        weight, bias = whole(f"{name}.weight", OUT, IN), whole(f"{name}.bias", OUT)
        layer.weight.data.copy_(shard(weight, 1 if name == "row" else 0, tensor))
        if layer.bias is not None:
            layer.bias.data.copy_(bias if name == "row" else shard(bias, 0, tensor))
    return built


def whole(what: str, *shape: int) -> torch.Tensor:
    """A tensor that every process computes alike, spread over four orders of magnitude."""
    generator = torch.Generator().manual_seed(sum(map(ord, what)))
    spread = torch.rand(shape, generator=generator, dtype=torch.float64) * 4 - 2
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 10**spread


def shard(tensor: torch.Tensor, axis: int, count: int) -> torch.Tensor:
    """This rank's piece."""
    return tensor.chunk(count, axis)[distributed.get_rank()].clone()


def run_layer(name: str, layer: Any, *, tensor: int, sequence_parallel: bool) -> dict[str, Any]:
    """This rank's output and gradients of one layer, for the same input everywhere."""
    row = name == "row"
    x, dy = whole(f"{name}.x", SEQ, BATCH, IN), whole(f"{name}.dy", SEQ, BATCH, OUT)
    if row:
        x, dy = shard(x, 2, tensor), shard(dy, 0, tensor) if sequence_parallel else dy
    else:
        x, dy = shard(x, 0, tensor) if sequence_parallel else x, shard(dy, 2, tensor)
    x.requires_grad_()
    y, _ = layer(x)
    y.backward(dy)
    grads = {f"d{key}": value.grad for key, value in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}


def run_layers(
    format: str | None, *, tensor: int = 1, sequence_parallel: bool = False, **options: Any
) -> dict[str, dict[str, Any]]:
    """All layers, quantised to a format with its options; this rank's results."""
    from tensortap_megatron.quantization import quantize

    built = layers(tensor=tensor, sequence_parallel=sequence_parallel)
    with contextlib.nullcontext() if format is None else quantize(built, format, **options):
        return {
            name: run_layer(name, layer, tensor=tensor, sequence_parallel=sequence_parallel)
            for name, layer in built.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--sequence-parallel", action="store_true")
    given = parser.parse_args()
    with ranks(tensor=2):
        results = {
            name: run_layers(
                None if name == "none" else name,
                tensor=2,
                sequence_parallel=given.sequence_parallel,
            )
            for name in given.formats
        }
        torch.save(results, given.folder / f"rank{distributed.get_rank()}.pt")
        distributed.barrier()
    time.sleep(1)
    os._exit(0)  # Threads of gloo would abort the interpreter's shutdown.


if __name__ == "__main__":
    main()
