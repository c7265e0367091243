"""Megatron's distributed checkpoints: saved by all ranks, loaded by any number of ranks."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch import nn

LATEST = "latest_checkpointed_iteration.txt"


def resume(options: Namespace, model: nn.Module, optimizer: MegatronOptimizer) -> int:
    """Continue from the latest checkpoint; the number of steps done, 0 where there is none."""
    if not options.checkpoint or not (options.checkpoint / LATEST).exists():
        return 0
    latest = int((options.checkpoint / LATEST).read_text())
    return load(_place(options.checkpoint, latest), model, optimizer)


def save_if_due(
    options: Namespace, done: int, model: nn.Module, optimizer: MegatronOptimizer
) -> None:
    """Save after the last step, and after every `--save-every` steps."""
    due = done == options.steps or (options.save_every and done % options.save_every == 0)
    if options.checkpoint and due:
        save(options.checkpoint, done, model, optimizer)


def save(folder: Path, step: int, model: nn.Module, optimizer: MegatronOptimizer) -> None:
    """Write `folder/iter_<step>`, then name it as the latest: a save that dies leaves the last."""
    target = _place(folder, step)
    target.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(_state(model, optimizer, step, loading=False), str(target))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / LATEST).write_text(f"{step}\n")


def load(source: Path, model: nn.Module, optimizer: MegatronOptimizer) -> int:
    """Fill the model and the optimizer from one checkpoint; the number of steps it had done."""
    state = dist_checkpointing.load(_state(model, optimizer, 0, loading=True), str(source))
    unwrap_model(model).load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _place(folder: Path, step: int) -> Path:
    return folder / f"iter_{step:07d}"


def _state(
    model: nn.Module, optimizer: MegatronOptimizer, step: int, *, loading: bool
) -> dict[str, Any]:
    weights = unwrap_model(model).sharded_state_dict()
    moments = optimizer.sharded_state_dict(weights, is_loading=loading)
    return {"model": weights, "optimizer": moments, "step": step}
