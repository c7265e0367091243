"""What training prints, and what TensorBoard shows."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import nn


class Report:
    """One line a step, from rank 0; in TensorBoard `loss` and `grad_norm` over the steps."""

    def __init__(self, folder: Path | None) -> None:
        """Raise `ValueError` where a folder is given and TensorBoard is not installed."""
        self._board = _writer(folder) if folder else None
        self._since = time.perf_counter()

    def begin(self, options: Namespace, model: nn.Module, done: int) -> None:
        config = unwrap_model(model).config
        self.say(
            f"Llama: {config.num_layers} layers of {config.hidden_size}, {options.dtype}, "
            f"tp {options.tp} pp {options.pp} cp {options.cp} "
            f"dp {parallel_state.get_data_parallel_world_size()}"
        )
        if done:
            self.say(f"resumed after step {done - 1}; --steps is {options.steps}")

    def step(self, step: int, loss: float, norm: float | None) -> None:
        now = time.perf_counter()
        elapsed, self._since = now - self._since, now
        self.say(f"step {step:4d}  loss {loss:.5f}  {_norm(norm)}  {1e3 * elapsed:.0f} ms")
        if self._board and dist.get_rank() == 0:
            self._board.add_scalar("loss", loss, step)
            if norm is not None:
                self._board.add_scalar("grad_norm", norm, step)

    def say(self, line: str) -> None:
        if dist.get_rank() == 0:
            print(line, flush=True)

    def close(self) -> None:
        if self._board:
            self._board.close()


def _norm(norm: float | None) -> str:
    # Without a norm, fp16 gradients overflowed: Megatron skips the step and lowers the scale.
    return "skipped: gradients overflowed" if norm is None else f"grad norm {norm:.4f}"


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs TensorBoard: pip install tensorboard.") from None
    return SummaryWriter(str(folder)) if dist.get_rank() == 0 else None


def mean_over_ranks(losses: list[torch.Tensor], device: torch.device) -> float:
    """The step's loss, on every rank, from the microbatches' shares on the last stages."""
    total = torch.zeros((), device=device)
    if losses:
        total += torch.stack(losses).mean()
    dist.all_reduce(total)
    # Tensor parallel ranks repeat the loss, data parallel ranks average, context parallel add.
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return total.item() / (tp * parallel_state.get_data_parallel_world_size())
