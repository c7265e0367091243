"""From processes to a model ready to train: process groups, seeds, weights, optimizer."""

from __future__ import annotations

import os
from argparse import Namespace

import torch
import torch.distributed as dist
from hf_weights import load_hf_llama
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from model import DTYPES, Llama, build_stage, choose_spec, make_config


def start(options: Namespace) -> torch.device:
    """Join the other processes, over nccl or gloo, and take this rank's place among them."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    parallel_state.initialize_model_parallel(
        options.tp, options.pp, context_parallel_size=options.cp
    )
    # Stages hold different layers, tensor parallel ranks cut theirs from the same values.
    seed = options.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return device


def build(
    llama: Llama, options: Namespace, device: torch.device
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """The model as Megatron's training wraps it, and the optimizer of its parameters."""
    config = make_config(llama, options)
    stage = build_stage(llama, config, choose_spec(options), options.seq_length).to(device)
    if options.hf_model:
        load_hf_llama(stage, options.hf_model)
    module = stage if options.dtype == "fp32" else Float16Module(config, stage)
    buckets = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, buckets, module)
    optimizer = get_megatron_optimizer(_optimizer_config(options), [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return model, optimizer


def _optimizer_config(options: Namespace) -> OptimizerConfig:
    dtype = DTYPES[options.dtype]
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        adam_beta2=0.95,
        weight_decay=0.1,
        clip_grad=1.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # Megatron starts at 2 ** 32 and would skip the first twenty steps of a short run.
        initial_loss_scale=2.0**15,
    )
