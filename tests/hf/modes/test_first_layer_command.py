"""`tensortap modes first-layer`: one .npz of all modes, as the older script wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.hf.modes.conftest import LLAMA, MAMBA, shifting

from tensortap_hf import modes
from tensortap_hf.command import models
from tensortap_hf.modes import Changes, Mode

Cli = Callable[..., tuple[int, str, str]]
Shape = Callable[[dict[str, Any]], Path]


def test_the_files_are_those_of_the_older_script(cli: Cli, shape: Shape, tmp_path: Path) -> None:
    output = tmp_path / "first.npz"
    code, _, _ = cli(
        "modes", "first-layer", "--random-init", shape(MAMBA), "--modes", "fp32,0,2-1",
        "--seq-len", 8, "--calib-samples", 1, "--calib-seq-len", 8, "--output-file", output,
    )  # fmt: skip
    assert code == 0
    with np.load(output, allow_pickle=False) as values:
        arrays = {key: values[key] for key in values}
    assert set(arrays) == {
        f"mode_{mode}_{what}" for mode in ("fp32", "0", "2-1") for what in ("input", "output")
    }
    assert all(value.shape == (1, 8, 32) for value in arrays.values())
    stats = json.loads((tmp_path / "first_stats.json").read_text())
    assert {"timestamp", "model", "pretrained_dir", "seq_len", "modes"} <= set(stats)
    assert stats["seq_len"] == 8
    assert stats["basis"] == dict.fromkeys(("fp32", "0", "2-1"), "rotated")
    assert stats["tensors"]["0"] == ["layers.0/forward/input", "layers.0.mixer/forward/output"]
    assert "mixer's, before the residual" in stats["note"]
    for mode in ("fp32", "0", "2-1"):
        for what in ("input", "output"):
            wide = arrays[f"mode_{mode}_{what}"].astype(np.float64)
            said = stats["modes"][mode][what]
            assert set(said) == {"shape", "first_10", "mean", "std", "min", "max"}
            assert said["shape"] == [1, 8, 32]
            assert said["first_10"] == wide.ravel()[:10].tolist()
            assert said["mean"] == pytest.approx(wide.mean())
            assert said["std"] == pytest.approx(wide.std())
            assert (said["min"], said["max"]) == (wide.min(), wide.max())


def test_what_it_writes_is_what_the_layer_gets_and_its_mixer_gives(
    cli: Cli, shape: Shape, tmp_path: Path
) -> None:
    config, output = shape(MAMBA), tmp_path / "first.npz"
    cli(
        "modes", "first-layer", "--random-init", config, "--modes", "generic/mxfp8,generic/bf16",
        "--seq-len", 8, "--output-file", output,
    )  # fmt: skip
    model: Any = models.load(None, str(config), "cpu").model
    ids = torch.randint(260, (1, 8), generator=torch.Generator().manual_seed(0))
    seen = {}
    layer = model.backbone.layers[0]
    layer.register_forward_pre_hook(lambda m, args: seen.__setitem__("input", args[0]))
    layer.mixer.register_forward_hook(lambda m, args, out: seen.__setitem__("output", out))
    with np.load(output, allow_pickle=False) as values:
        for mode in ("mxfp8", "bf16"):
            with modes.apply(model, mode, family="generic"), torch.no_grad():
                model(input_ids=ids)
            for what, tensor in seen.items():
                found = values[f"mode_{mode}_{what}"]
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, tensor.float().numpy())


def test_it_prints_both_sides_of_every_mode(cli: Cli, shape: Shape, tmp_path: Path) -> None:
    _, printed, _ = cli(
        "modes", "first-layer", "--random-init", shape(LLAMA), "--modes", "fp32,int8",
        "--seq-len", 8, "--output-file", tmp_path / "first",
    )  # fmt: skip
    for word in (
        "mode fp32", "mode int8", "INPUT  shape [1, 8, 32], mean", "OUTPUT  shape [1, 8, 32]",
        "std", "range [", "first 10: ", "layers.0/forward/output",
    ):  # fmt: skip
        assert word in printed
    assert (tmp_path / "first.npz").exists()
    assert (tmp_path / "first_stats.json").exists()


def test_values_that_are_not_finite_are_printed_and_kept_as_they_are(
    cli: Cli, shape: Shape, tmp_path: Path, new_family: Any
) -> None:
    new_family("shifts", shifting("nan", "shifts", float("nan")))
    output = tmp_path / "first.npz"
    code, printed, _ = cli(
        "modes", "first-layer", "--random-init", shape(LLAMA), "--modes", "nan", "--seq-len", 4,
        "--output-file", output,
    )  # fmt: skip
    assert code == 0
    assert "mean -, std -, range [-, -]" in printed
    text = (tmp_path / "first_stats.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["modes"]["nan"]["input"]["mean"] is None
    with np.load(output, allow_pickle=False) as values:
        assert np.isnan(values["mode_nan_input"]).all()


def test_the_encoder_is_what_comes_first(build: Any, cli: Cli, tmp_path: Path) -> None:
    build("t5").save_pretrained(tmp_path / "model")
    code, _, _ = cli(
        "modes", "first-layer", tmp_path / "model", "--modes", "fp32", "--seq-len", 4,
        "--output-file", tmp_path / "first.npz",
    )  # fmt: skip
    assert code == 0
    stats = json.loads((tmp_path / "first_stats.json").read_text())
    assert stats["tensors"]["fp32"][0] == "encoder.layers.0/forward/input"


def test_files_that_are_there_are_kept(cli: Cli, shape: Shape, tmp_path: Path) -> None:
    arguments = (
        "modes", "first-layer", "--random-init", shape(LLAMA), "--modes", "fp32", "--seq-len", 4,
        "--output-file", tmp_path / "first.npz",
    )  # fmt: skip
    assert cli(*arguments)[0] == 0
    code, _, errors = cli(*arguments)
    assert code == 2
    assert "first.npz exists" in errors
    assert cli(*arguments, "--overwrite", "--json")[0] == 0


def test_a_failing_mode_is_reported_and_the_others_are_in_the_file(
    cli: Cli, shape: Shape, tmp_path: Path, new_family: Any
) -> None:
    def fails(model: Any, undo: Any, options: Any) -> Changes:
        raise RuntimeError("not today")

    new_family("frail", Mode("breaks", "frail", "breaks", fails))
    output = tmp_path / "first.npz"
    arguments = ("modes", "first-layer", "--random-init", shape(LLAMA), "--seq-len", 4)
    code, printed, errors = cli(
        *arguments, "--modes", "breaks,fp32", "--output-file", output, "--json"
    )
    assert code == 1
    assert "mode breaks failed: RuntimeError: not today" in errors
    assert json.loads(printed)["failed"] == {"breaks": "RuntimeError: not today"}
    with np.load(output, allow_pickle=False) as values:
        assert sorted(values) == ["mode_fp32_input", "mode_fp32_output"]
    code, _, _ = cli(*arguments, "--modes", "breaks", "--output-file", tmp_path / "none.npz")
    assert code == 2
    assert not (tmp_path / "none.npz").exists()
