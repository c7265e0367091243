"""`neuron layers --device neuron` on a fake of the device: run by test_native_layers.py."""

from __future__ import annotations

from pathlib import Path

from tests.neuron import fake_neuron
from tests.neuron.command.conftest import Checkpoint
from tests.neuron.fake_neuron import waits
from tests.neuron.layouts.commands import Command

import tensortap

fake_neuron.install()


def test_every_layer_is_captured_on_the_device_and_agrees_with_the_cpu(
    tt: Command, checkpoint: Checkpoint, tmp_path: Path
):
    model = checkpoint()
    for device in ("cpu", "neuron"):
        waits.clear()
        code, _, error = tt(
            "neuron", "layers", "--model", model, "--prompt", "Paris is", "--device", device,
            "--out", tmp_path / device,
        )  # fmt: skip
        assert code == 0, error
    assert waits["synchronize"] == 1, "at the end of the step"
    with tensortap.open_run(tmp_path / "neuron" / "prompt-0" / "run") as run:
        assert {record.device for record in run.records()} == {"neuron:0"}
    given = ("--gpu-path", tmp_path / "cpu", "--neuron-path", tmp_path / "neuron", "--json")
    code, found, _ = tt("neuron", "compare", *given)
    assert code == 0
    assert len(found["prompts"][0]["layers"]) == 5
