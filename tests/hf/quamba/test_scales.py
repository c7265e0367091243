"""Scales in files: safetensors for the numbers, JSON for what they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tensortap.errors import ConfigError
from tensortap_hf import modes
from tensortap_hf.quamba import LayerScales, Scales


def some_scales(calibrated: Any) -> Scales:
    return calibrated[1]


@pytest.mark.parametrize("written", ["scales", "scales.safetensors", "scales.json", "pa-0.9999"])
def test_scales_read_back_equal(written: str, calibrated: Any, tmp_path: Path) -> None:
    scales = some_scales(calibrated)
    scales.save(tmp_path / "new" / written)
    assert Scales.load(tmp_path / "new" / written) == scales
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_the_files_say_what_is_in_them(calibrated: Any, tmp_path: Path) -> None:
    scales = some_scales(calibrated)
    scales.save(tmp_path / "s")
    said = json.loads((tmp_path / "s.json").read_text())
    assert said["percentile_alpha"] == 0.9995
    assert said["sample_lengths"] == [40, 25, 33]
    columns = load_file(tmp_path / "s.safetensors")
    assert columns["ssm_state"].dtype == torch.float32
    assert columns["ssm_state"].tolist() == [layer.ssm_state for layer in scales.layers]


def test_loaded_scales_give_the_same_bits(calibrated: Any, seen: Any, tmp_path: Path) -> None:
    model, scales, ids = calibrated
    scales.save(tmp_path / "s")
    loaded = seen(model, ids, "2-1", calibration=Scales.load(tmp_path / "s"))
    assert torch.equal(loaded.logits, seen(model, ids, "2-1", calibration=scales).logits)


def test_missing_and_foreign_files_are_named(calibrated: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing"):
        Scales.load(tmp_path / "nothing")
    some_scales(calibrated).save(tmp_path / "s")
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(ConfigError, match="schema None"):
        Scales.load(tmp_path / "s")
    (tmp_path / "s.json").write_text('{"schema": 1, "hidden_size": 24}')
    with pytest.raises(ConfigError, match="no scales of Quamba"):
        Scales.load(tmp_path / "s")
    (tmp_path / "s.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"s\.safetensors"):
        Scales.load(tmp_path / "s")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="ssm_state"):
        LayerScales(1, 1, 1, 1, 1, 1, scale)


def test_scales_of_another_model_are_refused(calibrated: Any, mamba: Any) -> None:
    for other in (mamba(layers=2), mamba(hidden=48, layers=4)):
        with pytest.raises(ConfigError, match="of another model"):
            modes.apply(other, "0", family="quamba", calibration=some_scales(calibrated))
        assert all("forward" not in vars(module) for module in other.modules())
