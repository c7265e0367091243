"""What capturing costs on lazy XLA devices: graphs run, transfers, compilations, and time.

    PJRT_DEVICE=CPU .xla-venv/bin/python benchmarks/neuron_xla.py [--layers 12] [--steps 5]

`make test-xla` makes the environment. A Llama of the given depth (hidden 128, 2 x 64 tokens) does
forwards, and training steps with SGD; torch_xla's own metrics count. The naive lanes are hooks
that copy every module's output to the CPU at once, or after the step. Run it alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import tensortap

COLUMNS = ("graphs run", "transfers", "compiled", "first step", "median step", "tensors")
Lane = Callable[[torch.nn.Module, "Kept"], Any]


@dataclass
class Kept:
    """What a lane kept; the tensors of a naive one wait here."""

    lazily: list[torch.Tensor] = field(default_factory=list)
    tensors: int = 0

    def fetch(self) -> None:
        """After the step."""
        self.tensors += len([tensor.cpu() for tensor in self.lazily])
        self.lazily.clear()


@contextmanager
def untapped(model: torch.nn.Module, kept: Kept) -> Iterator[None]:
    """Nothing."""
    yield


@contextmanager
def copied_at_once(model: torch.nn.Module, kept: Kept) -> Iterator[None]:
    """Hooks that call `.cpu()`."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            output.detach().cpu()
            kept.tensors += 1

    yield from _hooked(model, hook)


@contextmanager
def copied_after(model: torch.nn.Module, kept: Kept) -> Iterator[None]:
    """Hooks that clone lazily; each clone is copied by itself after the step's synchronisation."""

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            kept.lazily.append(output.detach().clone())

    yield from _hooked(model, hook)


def _hooked(model: torch.nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in model.modules()]
    yield
    for handle in handles:
        handle.remove()


def tapped(**options: Any) -> Lane:
    """A tap with some options."""

    @contextmanager
    def lane(model: torch.nn.Module, kept: Kept) -> Iterator[None]:
        sink = tensortap.MemorySink()
        with tensortap.attach(model, sink, on_error="raise", **options):
            yield
        kept.tensors = len(sink.records)

    return lane


LANES: dict[str, Lane] = {
    "untapped": untapped,
    "stats": tapped(phases=("forward", "backward")),
    "full": tapped(values="full", phases=("forward", "backward")),
    "stats, steps=0": tapped(steps="0", phases=("forward", "backward")),
    "naive: .cpu() in hooks": copied_at_once,
    "naive: .cpu() after the step": copied_after,
}


def count() -> tuple[int, int, int]:
    """Graphs run, transfers to the host and compilations so far."""
    xm.wait_device_ops()
    names = ("ExecuteTime", "TransferFromDeviceTime", "CompileTime")
    first, second, third = ((metrics.metric_data(name) or [0])[0] for name in names)
    return first, second, third


def step_of(model: torch.nn.Module, tokens: torch.Tensor, *, training: bool) -> Callable[[], None]:
    """One forward, or one training step, with the synchronisation at its end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def train() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch_xla.sync()

    def infer() -> None:
        with torch.no_grad():
            output = model(tokens)  # Else nobody would want it, and nothing would run.
        torch_xla.sync()
        del output

    model.train(training)
    return train if training else infer


def measure(lane: Lane, model: torch.nn.Module, step: Callable[[], None], steps: int) -> list[str]:
    """A row of the table: counts are of one step after the first."""
    kept, seconds = Kept(), []
    with lane(model, kept):
        for number in range(steps + 1):
            before, begin = count(), time.perf_counter()
            step()
            kept.fetch()
            after = count()
            seconds.append(time.perf_counter() - begin)
            if number == 0:
                compiled = after[2] - before[2]
    runs, transfers, again = (b - a for a, b in zip(before, after, strict=True))
    return [
        str(runs), str(transfers), f"{compiled}, then {again}", f"{seconds[0]:.1f} s",
        f"{1e3 * statistics.median(seconds[1:]):.0f} ms", str(kept.tensors // (steps + 1)),
    ]  # fmt: skip


def main() -> None:
    """Print one table for forwards and one for training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lanes", nargs="+", default=list(LANES), choices=list(LANES))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=chosen.layers,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=1000,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("xla")
    tokens = torch.randint(0, 1000, (2, 64)).to("xla")
    torch_xla.sync()
    console = Console(width=110)
    for training in (False, True):
        kind = "training steps" if training else "forwards"
        table = Table(title=f"{kind}, {chosen.layers} layers, torch_xla {torch_xla.__version__}")
        for column in ("lane", *COLUMNS):
            table.add_column(column, justify="left" if column == "lane" else "right")
        step = step_of(model, tokens, training=training)
        step()
        for name in chosen.lanes:
            table.add_row(name, *measure(LANES[name], model, step, chosen.steps))
        console.print(table)


if __name__ == "__main__":
    main()
