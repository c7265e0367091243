"""What is measured: each lane observes the training of one model in its own way.

A lane is a context manager over the whole training; it yields a context manager for one step.
Its libraries are imported inside, since the peers live in an environment of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

Step = Callable[[], AbstractContextManager[Any]]
Lane = Callable[[nn.Module, Path], AbstractContextManager[Step]]

WARM_UP = "0"
"""The step before the measured ones: a capture that ends with nothing is an error."""


@contextmanager
def untapped(model: nn.Module, scratch: Path) -> Iterator[Step]:
    """Nothing observes."""
    yield nullcontext


@contextmanager
def tensortap_lane(
    model: nn.Module, scratch: Path, *, enabled: bool = True, **options: Any
) -> Iterator[Step]:
    """A tap with `options` over the whole training; its run lies in `scratch/run`."""
    os.environ["TENSORTAP_ENABLED"] = "1" if enabled else "0"
    import tensortap

    options = {"phases": ("forward", "backward"), "using": "native", **options}
    with tensortap.attach(model, scratch / "run", on_error="raise", **options):
        yield nullcontext


@contextmanager
def naive(
    model: nn.Module, scratch: Path, *, see: Callable[[Path, str, torch.Tensor], None]
) -> Iterator[Step]:
    """Hooks on every module hand inputs, outputs and their gradients to `see`, one by one."""
    scratch.mkdir(parents=True, exist_ok=True)
    handles = []
    for name, module in model.named_modules():
        forward, backward = _naive_hooks(partial(see, scratch), name or "root")
        handles.append(module.register_forward_hook(forward))
        handles.append(module.register_full_backward_hook(backward))
    try:
        yield nullcontext
    finally:
        for handle in handles:
            handle.remove()


def _naive_hooks(
    see: Callable[[str, torch.Tensor], None], name: str
) -> tuple[Callable[..., None], Callable[..., None]]:
    def forward(module: nn.Module, inputs: Any, outputs: Any) -> None:
        see_all("input", inputs)
        see_all("output", dict(outputs) if isinstance(outputs, dict) else outputs)

    def backward(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> None:
        see_all("grad_output", grad_outputs)
        see_all("grad_input", grad_inputs)

    def see_all(tensor: str, values: Any) -> None:
        for index, value in enumerate(_tensors(values)):
            see(f"{name}.{tensor}.{index}", value)

    return forward, backward


def _tensors(values: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


seen: list[tuple[Any, ...]] = []
"""What the naive hooks saw, in order."""


def see_statistics(scratch: Path, name: str, value: torch.Tensor) -> None:
    """The statistics people write by hand, each brought to the host with `.item()`."""
    x = value.detach().float()
    seen.append((
        name, x.mean().item(), x.std().item(), x.min().item(), x.max().item(), x.norm().item(),
        x.isnan().sum().item(), x.isinf().sum().item(),
    ))  # fmt: skip


def see_payload(scratch: Path, name: str, value: torch.Tensor) -> None:
    """One file a tensor, as people write it by hand."""
    seen.append((name,))
    torch.save(value.detach().clone().cpu(), scratch / f"{len(seen):06d}.{name}.pt")


@contextmanager
def mindstudio(model: nn.Module, scratch: Path, *, task: str) -> Iterator[Step]:
    """mindstudio-probe at module level (L0); `task` is `statistics` or `tensor`."""
    scratch.mkdir(parents=True, exist_ok=True)
    config = scratch / "config.json"
    config.write_text(json.dumps({
        "task": task, "dump_path": str(scratch / "dump"), "rank": [], "step": [], "level": "L0",
        task: {"scope": [], "list": [], "data_mode": ["all"]},
    }))  # fmt: skip
    from msprobe.pytorch import PrecisionDebugger

    debugger = PrecisionDebugger(config_path=str(config))

    @contextmanager
    def step() -> Iterator[None]:
        debugger.start(model=model)
        yield
        debugger.stop()
        debugger.step()

    yield step


ALL_PHASES = ("forward", "backward", "param", "grad")
LANES: dict[str, Lane] = {
    "untapped": untapped,
    "disabled": partial(tensortap_lane, enabled=False),
    "nothing-selected": partial(tensortap_lane, ranks="1"),
    "other-steps": partial(tensortap_lane, steps=WARM_UP),
    "stats": tensortap_lane,
    "stats+exponents": partial(tensortap_lane, exponents=True),
    "stats-4-phases": partial(tensortap_lane, phases=ALL_PHASES),
    "stats-hf": partial(tensortap_lane, using=None),
    "full": partial(tensortap_lane, values="full"),
    "naive-stats": partial(naive, see=see_statistics),
    "naive-full": partial(naive, see=see_payload),
    "mindstudio-stats": partial(mindstudio, task="statistics"),
    "mindstudio-full": partial(mindstudio, task="tensor"),
}
