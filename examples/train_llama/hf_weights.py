"""A Hugging Face Llama's weights in Megatron's layout, cut for one tensor and pipeline rank."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def load_hf_llama(
    model: nn.Module,
    source: Path | str | Mapping[str, Tensor],
    *,
    tp_rank: int | None = None,
    tp_size: int | None = None,
) -> None:
    """Copy the weights of a Llama into this rank's `GPTModel`, in place.

    `source` is a folder with safetensors, or the `state_dict()` of a `LlamaForCausalLM`. The ranks
    default to Megatron's; a stage finds its layers by their `layer_number`. Raises `ValueError`
    for a parameter that `source` does not fill, by its name.
    """
    if tp_rank is None or tp_size is None:
        from megatron.core import parallel_state

        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
    weights = _Folder(Path(source)) if isinstance(source, (str, Path)) else source
    targets = dict(model.named_parameters())
    for name, value in _megatron_weights(model, weights, tp_rank, tp_size):
        if name in targets:
            _copy(name, targets.pop(name), value)
    if targets:
        raise ValueError(f"The Hugging Face model has nothing for {', '.join(targets)}.")


def _megatron_weights(
    model: nn.Module, weights: Mapping[str, Tensor], rank: int, size: int
) -> Iterator[tuple[str, Tensor]]:
    """Megatron's names and this rank's values, read one by one; some names fit only one spec."""
    embed = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embed)
    yield "embedding.word_embeddings.weight", _rows_of_vocabulary(embed, rank, size)
    yield "output_layer.weight", _rows_of_vocabulary(head, rank, size)
    yield "decoder.final_layernorm.weight", weights["model.norm.weight"]
    for local, layer in enumerate(model.decoder.layers):
        theirs, ours = f"model.layers.{layer.layer_number - 1}", f"decoder.layers.{local}"
        norms = weights[f"{theirs}.input_layernorm.weight"]
        yield f"{ours}.input_layernorm.weight", norms
        yield f"{ours}.self_attention.linear_qkv.layer_norm_weight", norms
        norms = weights[f"{theirs}.post_attention_layernorm.weight"]
        yield f"{ours}.pre_mlp_layernorm.weight", norms
        yield f"{ours}.mlp.linear_fc1.layer_norm_weight", norms

        q, k, v, o = (weights[f"{theirs}.self_attn.{x}_proj.weight"] for x in "qkvo")
        qkv = interleave_groups(q, k, v, layer.config.num_query_groups)
        yield f"{ours}.self_attention.linear_qkv.weight", qkv.chunk(size)[rank]
        yield f"{ours}.self_attention.linear_proj.weight", o.chunk(size, dim=1)[rank]

        gate, up, down = (weights[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
        fused = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        yield f"{ours}.mlp.linear_fc1.weight", fused
        yield f"{ours}.mlp.linear_fc2.weight", down.chunk(size, dim=1)[rank]


def interleave_groups(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Megatron's fused rows: for each query group its query heads, then its key and value head."""
    by_group = [weight.unflatten(0, (groups, -1)) for weight in (q, k, v)]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _rows_of_vocabulary(weight: Tensor, rank: int, size: int) -> Tensor:
    """The rows of one rank; where the last rank has too few, zeros."""
    rows = -(-len(weight) // size)
    mine = weight[rank * rows : (rank + 1) * rows]
    return nn.functional.pad(mine, (0, 0, 0, rows - len(mine)))


def _copy(name: str, target: Tensor, value: Tensor) -> None:
    if target.shape != value.shape:
        raise ValueError(f"{name} is {tuple(target.shape)} here, {tuple(value.shape)} in the file.")
    with torch.no_grad():
        target.copy_(value)


class _Folder(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        files = [folder / "model.safetensors"]
        if index.exists():
            names = json.loads(index.read_text())["weight_map"].values()
            files = [folder / name for name in sorted(set(names))]
        if not files[0].exists():
            raise ValueError(f"{folder} holds no model.safetensors.")
        opened = [safe_open(file, framework="pt") for file in files]
        self._files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
