"""One training step of a small Megatron model, spread over the processes of this launch.

    torchrun --nproc-per-node 2 tests/megatron/spread.py OUT '{"tp": 2, "sequence_parallel": true}'

The weights depend on names and logical shapes only, so they are the same however they are split.
Runs the step untapped, then tapped, requires that loss and gradients are bitwise equal, and
writes the run to OUT/run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.train_llama.cpu import CPU_CONFIG, leave, run_on_cpu  # noqa: E402
from examples.train_llama.hf_weights import load_hf_llama  # noqa: E402

import tensortap  # noqa: E402

LAYERS, HIDDEN, HEADS, FFN, VOCAB, REAL_VOCAB, SEQ, BATCH = 4, 32, 4, 48, 96, 90, 16, 2
DENSE = {
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    "normalization": "RMSNorm",
    "num_query_groups": 2,
}
BIASED = {"add_bias_linear": True, "normalization": "LayerNorm", "num_query_groups": 1}
SPARSE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_ffn_hidden_size": FFN,
    "moe_router_load_balancing_type": "none",
    **DENSE,
}
KINDS: dict[str, dict[str, Any]] = {"dense": DENSE, "biased": BIASED, "sparse": SPARSE}


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    run_on_cpu(force=True)
    _initialise(options)
    models = build(options)
    reference = step(models, options)
    spoil(models[0], options.get("spoil"))
    tap = tensortap.attach(
        models if len(models) > 1 else models[0],
        out / "run",
        **{"values": "full", "on_error": "raise", **options.get("attach", {})},
    )
    tapped = step(models, options)
    if torch.distributed.get_rank() == options.get("kill"):
        tap.step()
        os.kill(os.getpid(), signal.SIGKILL)
    if "optimizer" in options:
        train(models, options)
    elif options.get("pp", 1) == 1 and options.get("cp", 1) == 1:
        generate(models[0])
    tap.detach()
    if "spoil" not in options:
        require_equal(reference, tapped)
    (out / f"{tapped['rank']}.json").write_text(json.dumps(tapped["loss"]))
    leave()


def _initialise(options: dict[str, Any]) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.get("tp", 1),
        pipeline_model_parallel_size=options.get("pp", 1),
        virtual_pipeline_model_parallel_size=options.get("vp"),
        context_parallel_size=options.get("cp", 1),
        expert_model_parallel_size=options.get("ep", 1),
        expert_tensor_parallel_size=options.get("etp", 1),
    )
    model_parallel_cuda_manual_seed(1)


def _config(options: dict[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        ffn_hidden_size=FFN,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=options.get("tp", 1),
        pipeline_model_parallel_size=options.get("pp", 1),
        virtual_pipeline_model_parallel_size=options.get("vp"),
        context_parallel_size=options.get("cp", 1),
        expert_model_parallel_size=options.get("ep", 1),
        expert_tensor_parallel_size=options.get("etp", 1),
        sequence_parallel=options.get("sequence_parallel", False),
        pipeline_dtype=torch.float32,
        qk_layernorm=options.get("qk_layernorm", False),
        **{**CPU_CONFIG, **KINDS[options.get("kind", "dense")], **options.get("config", {})},
    )


def build(options: dict[str, Any]) -> list[Any]:
    """The chunks of this stage, with their weights, wrapped in Megatron's own DDP."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = _config(options)
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
    )
    models = []
    for chunk in range(options.get("vp") or 1):
        stage = {"vp_stage": chunk} if options.get("vp") else {}
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=not stage, **stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=not stage, **stage)
        model = GPTModel(
            config,
            spec,
            vocab_size=VOCAB,
            max_sequence_length=SEQ,
            pre_process=first,
            post_process=last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=options.get("tied", False),
            **stage,
        )
        model.unpadded_vocab_size = REAL_VOCAB
        load_hf_llama(model, options["hf"]) if "hf" in options else fill(model)
        gathers = "optimizer" in options
        ddp = DistributedDataParallelConfig(
            overlap_grad_reduce=options.get("overlap", gathers),
            use_distributed_optimizer=gathers,
            overlap_param_gather=gathers,
        )
        models.append(DistributedDataParallel(config, ddp, model))
    return models


def train(models: list[Any], options: dict[str, Any]) -> None:
    """Two more steps, with Megatron's distributed optimizer, which gathers parameters late."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = OptimizerConfig(
        optimizer="adam", lr=options["optimizer"], use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(settings, models)
    optimizer.step()
    for _ in range(2):
        step(models, options)
        optimizer.step()


def generate(model: Any) -> None:
    """A forward as in generation, which gathers the logits on every rank."""
    data = batch(0, 0)
    mask = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    with torch.no_grad():
        model(data["tokens"], data["position_ids"], mask, runtime_gather_output=True)


def spoil(model: Any, name: str | None) -> None:
    """Make one parameter of rank 1 differ from what it should be."""
    if name is not None and torch.distributed.get_rank() == 1:
        with torch.no_grad():
            dict(model.named_parameters())[f"module.{name}"].add_(0.5)


class Collectives(TorchDispatchMode):
    """Every collective and point-to-point operation that this rank issues."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def fill(model: torch.nn.Module) -> None:
    """Each rank takes its share of weights that depend on name and logical shape only."""
    from megatron.core import parallel_state

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            expert = ".experts." in name
            size, rank = (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_tensor_model_parallel_rank(),
            )
            if expert:
                size, rank = (
                    parallel_state.get_expert_tensor_parallel_world_size(),
                    parallel_state.get_expert_tensor_parallel_rank(),
                )
            gated = model.config.gated_linear_unit
            key = _global(model, name)
            parameter.copy_(_share(key, name, parameter, size, rank, gated=gated))


def _global(model: torch.nn.Module, name: str) -> str:
    """The name with the numbers that layers and experts have in the whole model."""

    def layer(found: re.Match[str]) -> str:
        return f"layers.{model.get_submodule(found[0].split('decoder.')[-1]).layer_number}"

    found = re.search(r"decoder\.layers\.\d+", name)
    if found is None:
        return name.replace("output_layer", "embedding.word_embeddings") if _tied(model) else name
    number = model.get_submodule(found[0]).layer_number
    name = name.replace(found[0], f"layers.{number}")
    expert = re.search(r"local_experts\.(\d+)", name)
    if expert is not None:
        first = model.get_submodule(found[0]).mlp.local_expert_indices[0]
        name = name.replace(expert[0], f"experts.{first + int(expert[1])}")
    return name


def _tied(model: Any) -> bool:
    return bool(model.share_embeddings_and_output_weights)


def _share(
    key: str, name: str, parameter: Any, size: int, rank: int, *, gated: bool
) -> torch.Tensor:
    shape = list(parameter.shape)
    dim = getattr(parameter, "partition_dim", -1)
    if getattr(parameter, "tensor_model_parallel", False) and dim >= 0:
        shape[dim] *= size
    else:
        size, rank = 1, 0
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    logical = torch.randn(shape, generator=generator) * 0.2
    if "norm" in name and name.endswith("weight"):
        logical += 1
    if "linear_fc1" in name and gated:
        halves = [half.chunk(size, 0)[rank] for half in logical.chunk(2, 0)]
        return torch.cat(halves, 0)
    return logical.chunk(size, max(dim, 0))[rank]


def batch(microbatch: int, replica: int) -> dict[str, torch.Tensor]:
    """Tokens of one microbatch of one data-parallel rank, cut for context parallelism."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    generator = torch.Generator().manual_seed(100 + 10 * replica + microbatch)
    tokens = torch.randint(0, REAL_VOCAB, (BATCH, SEQ + 1), generator=generator)
    whole = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "position_ids": torch.arange(SEQ).expand(BATCH, -1),
    }
    return get_batch_on_this_cp_rank(whole)


def step(models: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    """Two microbatches forward and backward through Megatron's own schedule."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    mask = torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool).triu(1)
    replica = parallel_state.get_data_parallel_rank()
    losses = []

    def forward(iterator: Any, model: Any) -> Any:
        data = next(iterator)
        output = model(data["tokens"], data["position_ids"], mask, labels=data["labels"])

        def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            losses.append(output.detach().clone())
            # The share of the mean over the whole sequence; Megatron multiplies by the group.
            tokens = BATCH * SEQ * parallel_state.get_context_parallel_world_size()
            return output.sum() / tokens, {}

        return output, loss_of

    for model in models:
        model.zero_grad_buffer()
    with Collectives() as collectives:
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([batch(n, replica) for n in range(2)]) for _ in models],
            model=models,
            num_microbatches=2,
            seq_length=SEQ,
            micro_batch_size=BATCH,
            forward_only=False,
        )
    gradients = {
        f"{number}.{name}": parameter.main_grad.clone()
        for number, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }
    loss = [float(value.mean()) for value in losses]
    return {
        "rank": torch.distributed.get_rank(),
        "loss": loss,
        "losses": losses,
        "gradients": gradients,
        "collectives": collectives.seen,
    }


def require_equal(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["collectives"] or torch.distributed.get_world_size() == 1
    assert one["collectives"] == two["collectives"], "the tap issued a collective, or lost one"
    assert _digest(one["losses"]) == _digest(two["losses"]), "the tap changed a loss"
    for name, gradient in one["gradients"].items():
        assert torch.equal(gradient, two["gradients"][name]), f"the tap changed {name}"


def _digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


if __name__ == "__main__":
    main()
