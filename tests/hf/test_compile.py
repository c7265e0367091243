"""Models under `torch.compile`, tapped before their first call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tensortap


@pytest.fixture(autouse=True)
def _dynamo_from_a_clean_start() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("which", "site", "tensors"),
    [
        ("llama", "layers.0.attn.core", ("query", "key", "value", "context")),
        ("mamba", "layers.0.mixer.scan", ("u", "dt", "B", "C", "output", "state")),
    ],
)
def test_functions_are_seen_in_compiled_code(
    which: str, site: str, tensors: tuple[str, ...], build: Any, inputs: Any, captured: Any
) -> None:
    def run(model: Any, call: Any) -> Any:
        sink = tensortap.MemorySink()
        with tensortap.attach(model, sink, values="full", on_error="raise"):
            for _ in range(2):
                call(**inputs(length=5)).loss.backward()
                model.zero_grad()
        return captured(sink)

    model = build(which, num_hidden_layers=1).train()
    plain = run(model, model)
    compiled = run(model, torch.compile(model, backend="eager"))
    for tensor in tensors:
        for call in (0, 1):
            name = f"{site}/forward/{tensor}"
            # Not bitwise: compiled, Mamba scans by association and not one token at a time.
            torch.testing.assert_close(compiled(name, call), plain(name, call))
    gradient = f"{site}/backward/grad_{tensors[0]}"
    torch.testing.assert_close(compiled(gradient), plain(gradient))
