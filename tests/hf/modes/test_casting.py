"""A cast model is what transformers loads in that dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tensortap_hf import modes

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("shape", ["llama", "gpt2", "bert", "mamba", "gemma2", "mixtral"])
def test_it_equals_the_model_that_transformers_loads_in_that_dtype(
    shape: str, mode: str, build: Any, tmp_path: Path, logits: Callable[..., torch.Tensor]
) -> None:
    model = build(shape)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=DTYPES[mode])
    with modes.apply(model, mode, family="generic"):
        assert {k: v.dtype for k, v in model.named_parameters()} == {
            k: v.dtype for k, v in loaded.named_parameters()
        }
        assert {k: v.dtype for k, v in model.state_dict().items()} == {
            k: v.dtype for k, v in loaded.state_dict().items()
        }
        assert torch.equal(logits(model), logits(loaded))


def test_what_a_family_keeps_in_float32_stays_there_and_is_said(build: Any) -> None:
    model = build("t5")
    with modes.apply(model, "fp16") as applied:
        assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.float32
        assert model.encoder.block[0].layer[1].DenseReluDense.wi.weight.dtype is torch.float16
        kept = applied.changes.kept
        assert kept["encoder.layers.0.mlp.down"] == "transformers keeps it in float32"
        assert "encoder.layers.0.mlp.up" in applied.changes.changed
    with modes.apply(model, "bf16") as applied:
        assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype is torch.bfloat16
        assert not applied.changes.kept


def test_a_half_precision_model_goes_up_to_float32(
    build: Any, logits: Callable[..., torch.Tensor]
) -> None:
    model = build("llama").to(torch.bfloat16)
    wide = build("llama").to(torch.bfloat16).to(torch.float32)
    with modes.apply(model, "fp32") as applied:
        assert torch.equal(logits(model), logits(wide))
        assert "layers.0.mlp.up" in applied.changes.changed
    assert model.dtype is torch.bfloat16


def test_tied_weights_stay_tied(build: Any) -> None:
    model = build("gpt2")
    with modes.apply(model, "bf16") as applied:
        assert {"embed", "lm_head"} < set(applied.changes.changed)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.lm_head.weight.dtype is torch.bfloat16
    assert model.lm_head.weight is model.transformer.wte.weight
