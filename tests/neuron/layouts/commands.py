"""The command line and small models, as tests of layouts use them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tensortap import cli

Result = tuple[int, Any, str]
"""Exit code, JSON (or text) on stdout, and stderr."""


class Command:
    """Runs `tensortap …` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *words: object) -> Result:
        """The result of one command; its output is parsed where it is JSON."""
        self._monkeypatch.setattr(sys, "argv", ["tensortap", *map(str, words)])
        self._capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self._capsys.readouterr()
        return code, json.loads(out) if "--json" in words and out else out, err


def small_llama(seed: int = 3) -> LlamaForCausalLM:
    """Two layers, hidden size 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def padded(tensor: torch.Tensor, bucket: int, axis: int) -> torch.Tensor:
    """`tensor` in a bucket: what a graph computes at pads is nonsense, so it is here."""
    shape = list(tensor.shape)
    shape[axis] = bucket - shape[axis]
    return torch.cat([tensor, torch.full(shape, 777.0, dtype=tensor.dtype)], dim=axis)


def files(folder: Path) -> list[str]:
    """Names of the files, sorted."""
    return sorted(path.name for path in folder.iterdir())
