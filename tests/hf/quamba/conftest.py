"""Small Mamba models whose every parameter matters, samples for them, and modes applied to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers

import tensortap
from tensortap_hf import modes, quamba

transformers.logging.set_verbosity_error()

VOCABULARY = 64
INT8 = ("0", "2-0", "2-1", "2-2", "2-3", "2-4", "3")
EVERY = ("fp32", *INT8)


def _mamba(hidden: int = 24, layers: int = 2, **changes: Any) -> Any:
    """A Mamba with no parameter at the value it is initialised to."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "state_size": 4,
        "time_step_rank": 3,
    }
    torch.manual_seed(3)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**{**fields, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif name.endswith(("conv1d.bias", "mixer.D")):
                parameter.normal_(0, 0.5)
            elif name.endswith(("in_proj.weight", "x_proj.weight", "embeddings.weight")):
                parameter.mul_(2)
    return model.eval()


def _samples(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (1, length), generator=generator) for length in lengths]


class Seen:
    """What one forward of a model in a mode showed: tensors by name, and their records."""

    def __init__(self, sink: tensortap.MemorySink, logits: torch.Tensor) -> None:
        self.sink = sink
        self.logits = logits

    def record(self, name: str) -> Any:
        """The only record of a name."""
        [(record, _)] = self.sink.find(name)
        return record

    def __call__(self, name: str) -> torch.Tensor:
        """The only payload of a name."""
        [(_, payload)] = self.sink.find(name)
        assert payload is not None
        return payload

    def values(self, name: str) -> torch.Tensor:
        """The numbers that codes stand for; other tensors as they are."""
        tensor = self(name)
        return tensor.float() * self(f"{name}_scale") if tensor.dtype == torch.int8 else tensor


def _seen(model: Any, ids: torch.Tensor, mode: str | None = None, **options: Any) -> Seen:
    """One forward, in a mode or in none."""
    sink = tensortap.MemorySink()
    if mode is None:
        with tensortap.attach(model, sink, values="full", on_error="raise"), torch.no_grad():
            return Seen(sink, model(ids, use_cache=False).logits)
    with modes.apply(model, mode, family="quamba", **options):
        return _seen(model, ids)


@pytest.fixture
def mamba() -> Callable[..., Any]:
    return _mamba


@pytest.fixture
def samples() -> Callable[..., list[torch.Tensor]]:
    return _samples


@pytest.fixture
def seen() -> Callable[..., Seen]:
    return _seen


@pytest.fixture(scope="session")
def calibrated() -> tuple[Any, quamba.Scales, torch.Tensor]:
    """A model of four layers, its scales, and a sample it was not calibrated with."""
    model = _mamba(layers=4)
    return model, quamba.calibrate(model, _samples(40, 25, 33)), _samples(48, seed=1)[0]


@pytest.fixture(scope="session")
def shown(calibrated: Sequence[Any]) -> dict[str, Seen]:
    """Mode -> what one forward of that model showed in it."""
    model, scales, ids = calibrated
    return {mode: _seen(model, ids, mode, calibration=scales) for mode in EVERY}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`mode`: every mode of the table; `int8_mode`: those that are not floats."""
    for argument, names in (("mode", EVERY), ("int8_mode", INT8)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names)
