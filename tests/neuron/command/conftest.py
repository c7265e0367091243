"""Fixtures of the tests of `tensortap neuron`: the command line, and small checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tests.neuron.layouts.commands import Command
from transformers import PreTrainedModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Checkpoint = Callable[..., Path]
SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 3}
ATTENDING = {
    **SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48
}  # fmt: skip
KINDS = {
    "llama": ("Llama", ATTENDING),
    "gpt2": ("GPT2", {"vocab_size": 256, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "mamba": ("Mamba", {**SMALL, "state_size": 4}),
    # The window is shorter than the prompts.
    "mistral": ("Mistral", {**ATTENDING, "sliding_window": 4}),
    "mixtral": ("Mixtral", {**ATTENDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture
def tt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`tensortap …`"""
    return Command(capsys, monkeypatch)


def model_of(kind: str, **changes: object) -> PreTrainedModel:
    """A decoder of three layers, the same weights every time."""
    family, shape = KINDS[kind]
    head = "LMHeadModel" if kind == "gpt2" else "ForCausalLM"
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**shape, **changes})
    return getattr(transformers, f"{family}{head}")(config).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Save a small decoder; `edit` changes it before. Returns its folder."""

    def save(kind: str = "llama", edit: Callable[[PreTrainedModel], None] | None = None) -> Path:
        model = model_of(kind)
        if edit is not None:
            with torch.no_grad():
                edit(model)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        return folder

    return save
