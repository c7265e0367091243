"""Small checkpoints in every layout, written by the libraries that real ones are written by."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tensortap_analysis.weights import Scope


def small_state(layers: int = 3, hidden: int = 16) -> dict[str, torch.Tensor]:
    """The names of a Llama, independent normal values."""
    state = {"model.embed_tokens.weight": torch.randn(40, hidden)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        state[f"{layer}.self_attn.q_proj.weight"] = torch.randn(hidden, hidden)
        state[f"{layer}.mlp.up_proj.weight"] = torch.randn(4 * hidden, hidden)
        state[f"{layer}.mlp.down_proj.weight"] = torch.randn(hidden, 4 * hidden)
        state[f"{layer}.input_layernorm.weight"] = torch.ones(hidden)
    state["model.norm.weight"] = torch.ones(hidden)
    state["lm_head.weight"] = torch.randn(40, hidden)
    return state


def safetensors_folder(
    folder: Path, state: dict[str, torch.Tensor], shards: int = 1, config: dict | None = None
) -> Path:
    """As `save_pretrained` writes it, with an index where there is more than one shard."""
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in list(state)[number::shards]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def read(model: object) -> dict[str, torch.Tensor]:
    """What a source gives, by name."""
    return {weight.name: weight.read().clone() for weight in Scope(model).source.weights}


def reasons(model: object) -> dict[str, str]:
    """Why what is skipped is skipped, by name."""
    return {one.name: one.reason for one in Scope(model).source.skipped}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name
