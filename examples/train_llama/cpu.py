"""Lets megatron-core 0.16 run, forward and backward, on a machine without a GPU.

Megatron-core writes `device="cuda"` in many places although nothing in them needs a GPU;
`run_on_cpu` redirects these for one process. The example and the tests use it; tensortap itself
never does.

What runs with it, over gloo: tensor, sequence, pipeline (also with virtual stages), data and expert
parallelism, DistributedDataParallel with `main_grad`, recomputed activations, Megatron's optimizers
and its distributed checkpoints. Context parallelism, for which Megatron needs Transformer Engine,
runs with keys and values gathered along the sequence. What does not run: Transformer Engine and
what Megatron cannot do without it (recomputing norms), Apex, CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU_CONFIG: dict[str, Any] = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "async_tensor_model_parallel_allreduce": False,
    "batch_p2p_comm": True,
}
"""Arguments of `TransformerConfig` without which Megatron asks for CUDA kernels."""


def run_on_cpu(*, force: bool = False) -> ExitStack:
    """Make Megatron-core run on the CPU, from now until `close()` or the end of a `with` block.

    Does nothing where there is a CUDA device, unless `force`. Raises `ImportError` if torch is old.
    """
    undo = ExitStack()
    if torch.cuda.is_available() and not force:
        return undo
    if not hasattr(torch.compiler, "set_stance"):
        raise ImportError(f"Without a GPU this needs torch 2.6, not {torch.__version__}")
    mode = _CudaMeansCpu()
    mode.__enter__()
    undo.callback(mode.__exit__, None, None, None)
    # Megatron hands small functions to torch.compile: slow to start, and in need of a compiler.
    torch.compiler.set_stance("force_eager")
    undo.callback(torch.compiler.set_stance, "default")
    _patch_torch(undo)
    _patch_megatron(undo)
    # `loss.backward()` takes the mode off, and runs layers again where activations are recomputed.
    run_backward = _within(mode, torch.autograd._engine_run_backward)
    _replace(undo, torch.autograd, "_engine_run_backward", run_backward)
    return undo


def _within(mode: TorchFunctionMode, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with mode:
            return function(*args, **options)

    return call


def _replace(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    if hasattr(owner, name):
        # A class's own entry keeps `staticmethod`, which getattr would lose.
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _patch_torch(undo: ExitStack) -> None:
    _replace(undo, torch.cuda, "current_device", lambda: torch.device("cpu"))
    _replace(undo, torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state())
    _replace(
        undo, torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)
    )
    _replace(undo, torch.cuda, "Stream", _Stream)
    _replace(undo, torch.cuda, "current_stream", lambda device=None: _Stream())
    _replace(undo, torch.cuda, "stream", lambda stream: nullcontext())
    for name in ("synchronize", "set_device", "empty_cache", "manual_seed"):
        _replace(undo, torch.cuda, name, lambda *args, **options: None)


def _patch_megatron(undo: ExitStack) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.dot_product_attention import DotProductAttention as Attention
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    _replace(undo, random, "_get_cuda_rng_state", lambda *a, **options: torch.get_rng_state())
    _replace(undo, random, "_set_cuda_rng_state", lambda state, *a, **o: torch.set_rng_state(state))
    _replace(undo, random.CudaRNGStatesTracker, "add", _add_seed)
    _replace(undo, random.CudaRNGStatesTracker, "fork", contextlib.contextmanager(_fork))
    _replace(undo, WrappedTorchNorm, "__new__", staticmethod(_norm(WrappedTorchNorm.__new__)))
    _replace(undo, Attention, "__init__", _accept_context_parallelism(Attention.__init__))
    _replace(undo, Attention, "forward", _gather_keys(Attention.forward))
    _replace(undo, token_dispatcher, "maybe_move_tensor_to_cpu", _as_splits)
    if not hasattr(moe_utils, "te_general_gemm"):
        # Megatron 0.16 asks whether this is None, but defines it only with Transformer Engine.
        _replace(undo, moe_utils, "te_general_gemm", None)
    if not filesystem_async.HAVE_PSUTIL:
        # Only logged, and only for debugging, but a checkpoint is refused without it.
        _replace(undo, filesystem_async, "_process_memory", lambda: 0)


def _accept_context_parallelism(build: Callable[..., None]) -> Callable[..., None]:
    def init(attention: Any, config: Any, *args: Any, **options: Any) -> None:
        local = copy.copy(config)
        local.context_parallel_size = 1
        build(attention, local, *args, **options)
        attention.config = config

    return init


def _gather_keys(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Queries `[s / cp, b, h, d]` stay where they are; keys and values become `[s, b, h, d]`."""
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as gather

    def forward(
        attention: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        if attention.config.context_parallel_size > 1:
            group = get_context_parallel_group()
            key, value = gather(key, group=group), gather(value, group=group)
            positions = _positions(len(key), group.size())
            mine = positions.chunk(group.size())[group.rank()]
            mask = (mine[:, None] < positions[None, :])[None, None]
        return attend(attention, query, key, value, mask, *args, **options)

    return forward


def _positions(length: int, ranks: int) -> torch.Tensor:
    """The positions of all ranks' tokens, one rank after the other.

    Rank r of n holds the chunks r and 2n - 1 - r of 2n, so that all ranks work equally.
    """
    chunks = torch.arange(length).chunk(2 * ranks)
    return torch.cat([chunk for r in range(ranks) for chunk in (chunks[r], chunks[-1 - r])])


def _as_splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron converts the sizes of an all-to-all to numpy only when they come from a GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _add_seed(tracker: Any, name: str, seed: int) -> None:
    tracker._is_initialized = True
    tracker.states_[name] = torch.Generator().manual_seed(seed).get_state()


def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Megatron's fork, on the CPU's generator; nothing is swapped when nothing was seeded."""
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_.get(name, outside))
    try:
        yield
    finally:
        if name in tracker.states_:
            tracker.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def _norm(build: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's norm is right under sequence parallelism; its parameters only have to say so."""

    def new(cls: type, config: Any, *args: Any, **options: Any) -> Any:
        accepted = copy.copy(config)
        accepted.sequence_parallel = False
        norm = build(cls, accepted, *args, **options)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return new


class _Stream:
    """The CPU has one stream, so every stream is the same and nothing waits."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Stream:
        return self

    def wait(self, stream: Any = None) -> None: ...


class _CudaMeansCpu(TorchFunctionMode):
    """Turns `device="cuda"` and `.cuda()` into the CPU, and names tensor types as CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers sort parameters by the words "torch.cuda.FloatTensor".
            return func(*args).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.")
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def leave() -> None:
    """End this process after the others are done: gloo's threads may abort a normal exit."""
    torch.distributed.barrier()
    if torch.cuda.is_available():
        torch.distributed.destroy_process_group()
        return
    for child in multiprocessing.active_children():
        # Megatron's checkpoint keeps a server that a hard exit would leave behind.
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    if torch.distributed.get_world_size() > 1:
        time.sleep(0.5)  # The other ranks may still be inside the barrier.
    os._exit(0)
