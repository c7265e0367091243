"""`tensortap neuron layers --device xla`: the whole prompt as one graph, and what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.neuron.command.conftest import KINDS, model_of
from tests.neuron.lazy import Cost

import tensortap
from tensortap_neuron.command import calling
from tensortap_neuron.command.capturing import Module
from tensortap_neuron.command.naming import places_of
from tensortap_neuron.command.prompts import Prompt

pytestmark = pytest.mark.xla

TEXT = "Paris is"


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_one_execution_and_one_transfer(xla, tmp_path: Path, kind):
    model = model_of(kind)
    calling.prepare(model)
    runner = Module(xla.put(model), xla.device, places_of(model))
    prompt = Prompt(0, TEXT, tuple(TEXT.encode()), "bytes")
    costs = [
        xla.cost(lambda out=tmp_path / name: runner.capture(prompt, out, {}))
        for name in ("first", "second")
    ]
    assert [(cost.executions, cost.transfers) for cost in costs] == [(1, 1), (1, 1)]
    assert costs[1] == Cost(1, 1, 0), "the second prompt of a length finds its graph compiled"


@pytest.mark.parametrize("kind", KINDS)
def test_xla_and_the_cpu_agree_within_rounding(xla, tt, checkpoint, tmp_path: Path, kind):
    model = checkpoint(kind)
    for device in ("cpu", "xla"):
        code, printed, error = tt(
            "neuron", "layers", "--model", model, "--prompt", TEXT, "--prompt", "another",
            "--device", device, "--out", tmp_path / device,
        )  # fmt: skip
        assert code == 0, error
        assert ("(CPU behind torch_xla)" in printed) == (device == "xla")
    with tensortap.open_run(tmp_path / "xla" / "prompt-0" / "run") as run:
        assert run.complete
        assert run.info.metadata["device"].startswith("xla")
        assert run.info.metadata["hardware"] == "CPU"
        assert "torch-xla" in run.info.metadata["packages"]
        assert {record.device.split(":")[0] for record in run.records()} == {"xla"}
    code, found, _ = tt(
        "neuron", "compare", "--gpu-path", tmp_path / "cpu", "--neuron-path", tmp_path / "xla",
        "--json",
    )  # fmt: skip
    assert code == 0
    assert [told["prompt"] for told in found["prompts"]] == [TEXT, "another"]
    for told in found["prompts"]:
        assert len(told["layers"]) == 5
        assert all(row["max_abs"] < 1e-4 for row in told["layers"])


def test_the_files_of_older_scripts_come_from_xla_as_well(xla, tt, checkpoint, tmp_path: Path):
    code, found, _ = tt(
        "neuron", "layers", "--model", checkpoint(), "--prompt", TEXT, "--device", "xla",
        "--dtype", "bf16", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    folder = Path(found["prompts"][0]["layers_pt"])
    values = torch.load(folder / "layer_2_output.pt", weights_only=True)
    assert (values.device.type, values.dtype, tuple(values.shape)) == (
        "cpu",
        torch.bfloat16,
        (1, 8, 32),
    )
    about = torch.load(folder / "metadata.pt", weights_only=True)
    assert about["prompt"] == TEXT
    assert about["statistics"]["layer_2"]["has_nan"] is False


def test_a_model_that_reads_a_value_is_captured_right_and_told_about(xla, tmp_path: Path):
    model = model_of("llama")
    prompt = Prompt(0, TEXT, tuple(TEXT.encode()), "bytes")
    Module(model, torch.device("cpu"), places_of(model)).capture(prompt, tmp_path / "cpu", {})
    layer = model.model.layers[1]
    layer.register_forward_hook(lambda module, given, made: made.sum().item() and None)
    runner = Module(xla.put(model), xla.device, places_of(model))
    with pytest.warns(tensortap.CaptureWarning, match="read a value"):
        runner.capture(prompt, tmp_path / "xla", {})
    with tensortap.open_run(tmp_path / "cpu") as one, tensortap.open_run(tmp_path / "xla") as two:
        assert two.complete
        assert one.names() == two.names()
        for name in one.names():
            assert torch.allclose(one.tensor(name), two.tensor(name), atol=1e-5), name
