"""Checkpoints whose weights are quantised already: run as they are, and nothing made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensortap
from tensortap.errors import NotSupported
from tensortap_hf import modes
from tensortap_hf.command import models
from tensortap_hf.modes.generic import quantization_method


@pytest.fixture
def int8_folder(build: Any, tmp_path: Path) -> Path:
    """A Llama whose linear layers torchao made int8, as transformers saves it."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    build("llama").save_pretrained(tmp_path / "plain")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    quantized.save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def test_a_torchao_checkpoint_is_captured_as_it_was_loaded(
    int8_folder: Path, cli: Callable[..., Any]
) -> None:
    code, printed, _ = cli(
        "modes", "capture", int8_folder, "--out", int8_folder / "runs", "--samples", 1,
        "--seq-len", 6, "--json",
    )  # fmt: skip
    assert code == 0
    assert [one["mode"] for one in json.loads(printed)["modes"]] == ["loaded"]
    model = models.load(str(int8_folder), None, "cpu").model
    with tensortap.open_run(int8_folder / "runs" / "loaded") as run:
        ids = torch.tensor(run.info.metadata["inputs"]["token_ids"])
        assert run.info.model_config["quantization_config"]["quant_method"] == "torchao"
        with torch.no_grad():
            wanted = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert torch.equal(run.tensor("layers.0/forward/output", step=0), wanted[1])


@pytest.mark.parametrize("mode", ["fp32", "bf16", "int8", "mxfp4"])
def test_no_other_mode_is_made_of_quantised_weights(int8_folder: Path, mode: str) -> None:
    model = models.load(str(int8_folder), None, "cpu").model
    assert quantization_method(model) == "torchao"
    with pytest.raises(NotSupported, match=r"quantised already \(torchao\).*Use mode loaded"):
        modes.apply(model, mode)


QUAMBA_CONFIG = {
    # As QuambaLMHeadModel.save_pretrained writes it: the fields of QuambaConfig, no model_type.
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "W8A8QMamba"},
    "rms_norm": True,
    "residual_in_fp32": True,
    "norm_cfg": {"norm": "QRMSNorm"},
    "embedding_cfg": {},
    "lm_head_cfg": {"layer": "Linear"},
    "is_hybrid": False,
}


@pytest.fixture
def quamba_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "quamba-130m-w8a8"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QUAMBA_CONFIG), encoding="utf-8")
    return folder


def test_a_quamba_checkpoint_is_refused_with_the_reason_where_quamba_is_not_installed(
    quamba_folder: Path, cli: Callable[..., Any]
) -> None:
    code, _, errors = cli("modes", "capture", quamba_folder, "--out", quamba_folder / "runs")
    assert code == 2
    assert "int8 checkpoint of Quamba, and the package quamba is not installed" in errors
    assert "no fp32 weights" in errors
    assert not (quamba_folder / "runs").exists()


class FakeBlock(nn.Module):
    """A layer of mamba_ssm: returns the mixer's output and the residual apart."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        total = hidden if residual is None else hidden + residual
        return self.mixer(total), total


class FakeBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(260, 8)
        self.layers = nn.ModuleList(FakeBlock() for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.embedding(ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        assert residual is not None
        return torch.as_tensor(hidden + residual)


class FakeQuamba(nn.Module):
    """The outline of QuambaLMHeadModel (github.com/enyac-group/Quamba, quamba_mixer_seq.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = FakeBackbone()
        self.lm_head = nn.Linear(8, 260)
        self.config = type("QuambaConfig", (), {"vocab_size": 260})()

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.lm_head(self.backbone(input_ids))


FakeQuamba.__name__ = "QuambaLMHeadModel"


def test_a_quamba_model_is_captured_as_it_was_loaded_where_quamba_is_installed(
    quamba_folder: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_quamba", lambda path: FakeQuamba())
    code, printed, _ = cli(
        "modes", "capture", quamba_folder, "--out", quamba_folder / "runs", "--samples", 2,
        "--seq-len", 5, "--json",
    )  # fmt: skip
    assert code == 0
    assert [(one["mode"], one["error"]) for one in json.loads(printed)["modes"]] == [
        ("loaded", None)
    ]
    with tensortap.open_run(quamba_folder / "runs" / "loaded") as run:
        assert any("layers.0.mixer/forward/output" in name for name in run.names())
    with pytest.raises(NotSupported, match=r"quantised already \(quamba\)"):
        modes.apply(FakeQuamba(), "fp32")


def test_a_checkpoint_of_mamba_ssm_is_refused_with_its_converted_twin(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"d_model": 768, "n_layer": 24}', encoding="utf-8")
    with pytest.raises(NotSupported, match=r"no model_type.*end in -hf"):
        models.load(str(tmp_path), None, "cpu")
