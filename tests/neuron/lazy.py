"""What tests on lazy devices share: torch_xla on the CPU, what a step cost there, small models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import nn

import tensortap


@dataclass(frozen=True)
class Cost:
    """What torch_xla's own metrics counted while something ran."""

    executions: int
    transfers: int
    compilations: int

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.executions - other.executions,
            self.transfers - other.transfers,
            self.compilations - other.compilations,
        )


class Xla:
    """torch_xla with its CPU as the device; importing it fails where it is not installed."""

    def __init__(self) -> None:
        os.environ.setdefault("PJRT_DEVICE", "CPU")
        # Most of the time of these tests would go into optimising code that runs once.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
        import torch_xla
        import torch_xla.core.xla_model
        import torch_xla.debug.metrics

        self.torch_xla: ModuleType = torch_xla
        self.model: ModuleType = torch_xla.core.xla_model
        self.metrics: ModuleType = torch_xla.debug.metrics
        self.device: torch.device = torch_xla.device()

    def sync(self) -> None:
        """What ends a step in the user's code."""
        self.torch_xla.sync()

    def put(self, value: nn.Module | torch.Tensor):
        """A module or tensor on the device, its upload done."""
        moved = value.to(self.device)
        self.sync()
        return moved

    def cost(self, run: Callable[[], object]) -> Cost:
        """What `run` costs."""
        before = self._so_far()
        run()
        return self._so_far() - before

    def _so_far(self) -> Cost:
        self.model.wait_device_ops()

        def count(*names: str) -> int:
            return sum((self.metrics.metric_data(name) or [0])[0] for name in names)

        return Cost(
            count("ExecuteTime", "ExecuteReplicatedTime"),
            count("TransferFromDeviceTime"),
            count("CompileTime"),
        )

    @contextmanager
    def no_execution(self) -> Iterator[None]:
        """torch_xla's own guard: anything that runs a graph in the block raises."""
        self.torch_xla._XLAC._set_allow_execution(False)
        try:
            yield
        finally:
            self.torch_xla._XLAC._set_allow_execution(True)


class Block(nn.Module):
    """A residual MLP with a norm before it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Deep(nn.Module):
    """Twelve layers."""

    def __init__(self, depth: int = 12, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def assert_same_run(
    expected: tensortap.MemorySink, found: tensortap.MemorySink, *, rtol: float = 1e-5
) -> None:
    """The same records; values and statistics equal up to `rtol` of a tensor's largest value."""
    assert found.names() == expected.names()
    assert found.steps == expected.steps
    for name in expected.names():
        for (one, value), (other, fetched) in zip(
            expected.find(name), found.find(name), strict=True
        ):
            assert (other.at, other.shape, other.dtype) == (one.at, one.shape, one.dtype), name
            assert other.device.startswith("xla"), name
            assert_same_statistics(one.stats, other.stats, rtol, name)
            if value is not None:
                scale = one.stats.absmax or 0.0
                assert fetched.dtype == value.dtype
                assert torch.allclose(fetched, value, rtol=rtol, atol=rtol * scale), name


def assert_same_statistics(one, other, rtol: float, name: str = "") -> None:
    """Counts equal; means within `rtol` of what the values allow, whose mean may be about zero."""
    for key in ("count", "nan", "posinf", "neginf"):
        assert getattr(other, key) == getattr(one, key), (name, key)
    scale = one.absmax or 0.0
    for key in ("min", "max", "absmax", "mean", "std", "rms"):
        assert _near(getattr(one, key), getattr(other, key), rtol, rtol * scale), (name, key)
    for key in ("l1", "l2"):
        assert _near(getattr(one, key), getattr(other, key), 10 * rtol), (name, key)


def _near(wanted: float | None, found: float | None, rel: float, least: float = 0.0) -> bool:
    """Both absent, or close."""
    if wanted is None or found is None:
        return wanted is found
    return bool(found == pytest.approx(wanted, rel=rel, abs=least + 1e-12))
