"""Folders with flipped bits: whatever comes of them is a run or a `RunError`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.neuron.layouts.commands import small_llama
from tests.neuron.layouts.writers import FakeCaptureWriter, FakeNxdiHook, OldRecorder

import tensortap
from tensortap.errors import RunError
from tensortap.layouts import layout
from tensortap.store import RunDirectorySink


def nxdi(folder: Path) -> None:
    hook = FakeNxdiHook(folder, ["layers.0", "norm"], capture_inputs=True)
    hook({"layers.0": torch.rand(1, 8, 4), "norm": torch.rand(1, 8, 4)})
    hook({"layers.0": torch.rand(1, 1, 4)}, {"layers.0": torch.rand(1, 1, 4)})


def vllm(folder: Path) -> None:
    writer, ids = FakeCaptureWriter(folder), ["a", "b"]
    ranks = {rank: torch.rand(8, 4) for rank in range(2)}
    positions = torch.tensor([0, 1, 0, 1, 2, 2, 2, 2])
    writer.write({"model.norm": ranks, "lm_head": torch.rand(2, 4)}, ids, positions, prefill=True)
    writer.write({"model.norm": torch.rand(2, 4)}, ids, torch.tensor([2, 3]), prefill=False)


def layers_pt(folder: Path) -> None:
    model, ids = small_llama(), torch.tensor([[1, 2, 3]])
    recorder = OldRecorder(model)
    with torch.no_grad():
        model(ids)
    mask = torch.tensor([[1, 1, 0]])
    recorder.save(folder, prompt="x", input_ids=ids, attention_mask=mask, config=model.config)


@pytest.mark.parametrize(
    ("name", "write"), [("nxdi", nxdi), ("vllm-neuron", vllm), ("layers-pt", layers_pt)]
)
def test_damaged_files_give_a_run_or_a_clear_error_that_leaves_none(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / "whole")
    rng, imported = random.Random(7), 0
    for number in range(30):
        folder, out = tmp_path / f"folder{number}", tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "whole", folder)
        for path in rng.sample(sorted(p for p in folder.rglob("*") if p.is_file()), 2):
            data = bytearray(path.read_bytes())
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            layout(name).load(folder, RunDirectorySink(out), lambda done: None)
        except RunError:  # Any other error fails the test.
            assert not out.exists()
            continue
        imported += 1
        with tensortap.open_run(out) as run:
            assert all(run.piece(record).shape == record.shape for record in run.records())
    assert imported > 15
