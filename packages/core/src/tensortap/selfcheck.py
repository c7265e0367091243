"""`selfcheck`: does the tap change what the model computes, and what does it cost?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from tensortap.sinks import MemorySink
from tensortap.tap import attach
from tensortap.targets import lazily_run
from tensortap.walk import tensors_in

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What changed with the tap on; `ulp` holds only tensors that differ.

    `ulp` is the largest distance in units in the last place, infinite where NaN meets a number
    or shapes differ; `overhead` the ratio of the median tapped to the median untapped time.
    """

    identical: bool
    ulp: Mapping[str, float]
    compared: int
    records: int
    overhead: float

    def __str__(self) -> str:
        verdict = "bitwise equal" if self.identical else f"{len(self.ulp)} differ"
        worst = max(self.ulp, key=self.ulp.__getitem__, default=None)
        detail = "" if worst is None else f"; worst {worst}: {self.ulp[worst]:g} ulp"
        return (
            f"tap on against off: {self.compared} tensors {verdict}{detail}; "
            f"{self.records} records a step; {self.overhead:.2f}x the untapped step"
        )


def selfcheck(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    repeats: int = 3,
    **options: Any,
) -> SelfCheck:
    """Run a step with the tap off and on, compare everything, print the result and return it.

    `batch` is given to the model: a mapping as keywords, a tuple as arguments, else as the one
    argument. `loss` makes the scalar to differentiate from the output; by default its `.loss`,
    else the mean of its first floating-point tensor, when that requires a gradient. Outputs,
    gradients of all parameters, buffers and the state of the random number generator are
    compared bit by bit; the model is left as it was. `options` are those of `attach`.
    """
    step = _Step(model, batch, loss)
    step.run()  # Lazy initialisation and caches are not the tap's doing.
    plain, off = zip(*[step.run() for _ in range(repeats)], strict=True)
    sink = MemorySink()
    with attach(model, sink, **options):
        tapped, on = zip(*[step.run() for _ in range(repeats)], strict=True)
    ulp = _differences(plain[-1], tapped[-1])
    result = SelfCheck(
        identical=not ulp,
        ulp=ulp,
        compared=len(plain[-1]),
        records=len(sink.records) // repeats,
        overhead=median(on) / median(off),
    )
    print(result)
    return result


@dataclass(frozen=True, slots=True)
class _Step:
    model: nn.Module
    batch: Any
    loss: Callable[[Any], torch.Tensor] | None

    def run(self) -> tuple[dict[str, torch.Tensor], float]:
        """One forward and backward from the same state; its results, and its seconds."""
        with _restored(self.model):
            begin = time.perf_counter()
            output = self._call()
            scalar = self.loss(output) if self.loss is not None else _scalar(output)
            if scalar is not None and scalar.requires_grad:
                scalar.backward()  # type: ignore[no-untyped-call]
            self._wait(output)
            seconds = time.perf_counter() - begin
            return self._results(output), seconds

    def _wait(self, output: Any) -> None:
        """Let the step be done: nothing is still queued, or only in a graph."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for backend in lazily_run(self.model):
            backend.run()
            for _, tensor in tensors_in("output", output):
                tensor.detach().cpu()

    def _call(self) -> Any:
        if isinstance(self.batch, Mapping):
            return self.model(**self.batch)
        return self.model(*self.batch) if isinstance(self.batch, tuple) else self.model(self.batch)

    def _results(self, output: Any) -> dict[str, torch.Tensor]:
        found = {name: t.detach().clone() for name, t in tensors_in("output", output)}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                found[f"{name}.grad"] = parameter.grad.clone()
        found |= {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return found | {"random number generator": torch.get_rng_state()}


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Run from, and go back to, the same buffers, gradients and random numbers."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _scalar(output: Any) -> torch.Tensor | None:
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    floats = (t for _, t in tensors_in("output", output) if t.is_floating_point())
    first = next(floats, None)
    return None if first is None else first.float().mean()


def _differences(
    plain: Mapping[str, torch.Tensor], tapped: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    distances = {
        name: _ulp(plain[name], tapped[name]) if name in plain and name in tapped else float("inf")
        for name in sorted(plain.keys() | tapped.keys())
    }
    return {name: distance for name, distance in distances.items() if distance}


def _ulp(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest distance in units in the last place; 0 only for equal bits."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return float("inf")
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    first, second = (_ordered(t).double() for t in (a, b))
    if first.numel() == 0 or torch.equal(_bits(a), _bits(b)):
        return 0.0
    nan = a.isnan() != b.isnan() if a.is_floating_point() else torch.zeros(())
    return float("inf") if bool(nan.any()) else max(float((first - second).abs().max()), 1.0)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous()
    return flat if flat.dtype is torch.bool else flat.view(_INTEGERS[flat.element_size()])


def _ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Bits as integers in the order of the values: neighbours differ by one."""
    bits = _bits(tensor).long()
    if not tensor.is_floating_point():
        return bits
    sign = torch.iinfo(_INTEGERS[tensor.element_size()]).min
    return torch.where(bits < 0, sign - bits, bits)
