"""Families of modes that exist only during a test, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tensortap.cli import app, main
from tensortap_hf.modes import Changes, Family, Mode, families, register, register_family, registry


@pytest.fixture
def new_family(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Family]:
    """Register a family with modes; forgotten after the test."""
    families()  # The built-in ones belong to what is kept.
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(
        registry, "_MODES", {name: dict(modes) for name, modes in registry._MODES.items()}
    )

    def make(name: str, *modes: Mode, **fields: Any) -> Family:
        options = {"refuse": lambda model: None, "presets": {}, **fields}
        family = Family(name, f"the family {name}", **options)
        register_family(family)
        for mode in modes:
            register(mode)
        return family

    return make


def shifting(name: str, family: str, shift: float, **fields: Any) -> Mode:
    """A mode that adds to the embedding."""

    def apply(model: Any, undo: Any, options: Any) -> Changes:
        weight = model.get_input_embeddings().weight
        before = weight.data
        undo.call(lambda: setattr(weight, "data", before))
        weight.data = before + shift
        return Changes(("embed",))

    return Mode(name, family, f"adds {shift}", apply, **fields)


@pytest.fixture
def logits() -> Callable[[nn.Module], torch.Tensor]:
    """What a model in evaluation mode says to fixed tokens."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model.eval()(input_ids=ids).logits
        return found

    return run


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run `tensortap ARGS`; returns (exit code, stdout, stderr)."""
    plugins = {entry.name for entry in entry_points(group="tensortap.commands")}
    own_commands = [one for one in app.registered_commands if one.name not in plugins]
    own_groups = [one for one in app.registered_groups if one.name not in plugins]

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tensortap", *map(str, arguments)])
        # In a process of its own the commands of plugins are added once.
        monkeypatch.setattr(app, "registered_commands", list(own_commands))
        monkeypatch.setattr(app, "registered_groups", list(own_groups))
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
MAMBA = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 4,
}
BERT = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def shape(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A config.json for `--random-init`."""

    def write(fields: dict[str, Any]) -> Path:
        folder = tmp_path / f"shape-{fields['model_type']}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return folder / "config.json"

    return write
