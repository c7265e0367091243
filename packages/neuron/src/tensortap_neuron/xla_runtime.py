"""`Runtime`: everything tensortap asks of torch_xla; its private calls are in this file only.

Each private call has a public stand-in, which is used where the call is missing or the version
was never looked at: then a step costs one transfer a tensor, and values are never shared.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Hashable, Sequence
from importlib import import_module
from typing import Any

import torch

from tensortap.errors import CaptureWarning, NotSupported

OLDEST = (2, 4)
"""Older ones have no `torch_xla.sync`."""
KNOWN = ((2, 5), (2, 9))
"""Whose sources were read for the private calls below; 2.9.0 is what the tests run with."""


class Runtime:
    """torch_xla as far as a backend needs it. Raises `NotSupported` for versions too old."""

    def __init__(self, *, private: bool = True) -> None:
        """`private=False` makes do with public calls."""
        self._torch_xla: Any = import_module("torch_xla")
        self._model: Any = import_module("torch_xla.core.xla_model")
        self._metrics: Any = import_module("torch_xla.debug.metrics")
        self._runtime: Any = import_module("torch_xla.runtime")
        self._spmd: Any = None
        self._mesh: Any = None
        self.version: str = self._torch_xla.__version__
        known = _known(self.version)
        if private and not known:
            warnings.warn(
                f"torch_xla {self.version} is none that tensortap knows ({_span()}): it captures "
                "through public calls, which cost one transfer a tensor.",
                CaptureWarning,
                stacklevel=3,
            )
        self._private: Any = self._torch_xla._XLAC if private and known else None

    def fetch(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies on the CPU, by one transfer; of tensors whose graph has run, or runs for it."""
        if self._private is None:
            return [tensor.cpu() for tensor in tensors]
        found: list[torch.Tensor] = self._private._xla_get_cpu_tensors(list(tensors))
        return found

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor; under SPMD a copy with one more axis, all of which every device computes.

        A result that lies there piecewise costs a compilation of its own each time it is fetched.
        The axis makes it a node of its own: a clone is the user's node, sharding included.
        """
        if not self._runtime.is_spmd():
            return tensor
        if self._mesh is None:
            self._spmd = import_module("torch_xla.distributed.spmd")
            self._mesh = self._spmd.get_1d_mesh("all")
        copy = tensor.unsqueeze(0).clone()
        self._spmd.mark_sharding(copy, self._mesh, (None,) * copy.ndim)
        return copy

    def identity(self, tensor: torch.Tensor) -> Hashable | None:
        """The same for two tensors only if they have the same value; `None` where nobody knows.

        An id is never used twice, but in-place collectives keep it: they change the node.
        """
        if self._private is None:
            return None
        node = self._private._unique_id_for_ir_and_data(tensor)
        return self._private._xla_get_tensor_id(tensor), node

    def may_run(self) -> bool:
        """May a graph be run here? Not inside `torch_xla.compile(full_graph=True)`."""
        return self._private is None or bool(self._private._get_allow_execution())

    def run(self) -> None:
        """Run the graph of all live tensors, without waiting for it.

        Unlike a step marker this leaves the random numbers to come and the user's step closures
        as they are; the public stand-in does its best about the former.
        """
        if self._private is None:
            seed = self._model.get_rng_state()
            self._torch_xla.sync()
            self._model.set_rng_state(seed)
            return
        device = self._private._xla_get_default_device()
        self._private._xla_sync_live_tensors(device, [], False)

    def runs(self) -> int:
        """How many graphs this process has run so far; 0 in eager mode, where each op is one."""
        if self._private is not None and self._private._get_use_eager_mode():
            return 0
        counters = ("CachedCompile", "UncachedCompile")
        return sum(self._metrics.counter_value(name) or 0 for name in counters)

    def after_sync(self, call: Callable[[], None]) -> None:
        """Call back once, after the user's next `torch_xla.sync()`."""
        self._model.add_step_closure(call)

    def place(self) -> tuple[int, int]:
        """Which process this is, and of how many."""
        return self._runtime.process_index(), self._runtime.process_count()

    def has_float64(self) -> bool:
        """Does the device compute in float64? Neuron and TPU do it in less, without a word."""
        return self._runtime.device_type() in ("CPU", "CUDA", "ROCM")


def _known(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else (0, 0)
    if number < OLDEST:
        raise NotSupported(
            f"torch_xla {version} found; {'.'.join(map(str, OLDEST))} or newer is supported."
        )
    return KNOWN[0] <= number <= KNOWN[1]


def _span() -> str:
    return " to ".join(".".join(map(str, version)) for version in KNOWN)
