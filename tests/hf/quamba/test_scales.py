"""Scales in files: safetensors for the numbers, JSON for what they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    with pytest.raises(ConfigError, match=r"s\.json holds no scales.*intermediate_size is None"):
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


def test_scales_of_other_weights_are_refused(calibrated: Any, mamba: Any) -> None:
    scales = some_scales(calibrated)
    other = mamba(layers=4)
    modes.apply(other, "0", family="quamba", calibration=scales).remove()
    with torch.no_grad():
        other.backbone.layers[2].mixer.D[0] += 1
    with pytest.raises(ConfigError, match="its weights are not"):
        modes.apply(other, "0", family="quamba", calibration=scales)
    assert all("forward" not in vars(module) for module in other.modules())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("percentile_alpha", "x"),
        ("percentile_alpha", 2.0),
        ("sample_lengths", "abc"),
        ("sample_lengths", [1, "2"]),
        ("hidden_size", True),
        ("weights", 7),
    ],
)
def test_values_of_a_wrong_type_are_named(
    calibrated: Any, tmp_path: Path, key: str, value: object
) -> None:
    some_scales(calibrated).save(tmp_path / "s")
    said = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps({**said, key: value}))
    with pytest.raises(ConfigError, match=rf"s\.json holds no scales.*{key} is"):
        Scales.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (torch.ones(4, 1), r"ssm_state is torch\.float32 \[4, 1\]"),
        (torch.ones(4, dtype=torch.int64), r"ssm_state is torch\.int64"),
        (torch.ones(3), "differ in length"),
        (torch.tensor([1, 1, float("inf"), 1]), "layer 2: the scale ssm_state is inf"),
    ],
)
def test_tensors_that_are_no_scales_are_named(
    calibrated: Any, tmp_path: Path, column: torch.Tensor, says: str
) -> None:
    some_scales(calibrated).save(tmp_path / "s")
    columns = load_file(tmp_path / "s.safetensors")
    save_file({**columns, "ssm_state": column}, tmp_path / "s.safetensors")
    with pytest.raises(ConfigError, match=rf"s\.safetensors.*{says}"):
        Scales.load(tmp_path / "s")
