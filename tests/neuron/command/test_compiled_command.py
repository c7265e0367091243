"""`tensortap neuron layers --compiled`, with a fake of NxDI: compile once, load, refuse others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.neuron.layouts.commands import small_llama
from tests.neuron.traced import fake_nxdi

import tensortap

TEXT = "Tokyo"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, and NxDI's fake whose artifacts have its weights."""
    llama = small_llama()
    fake_nxdi.install(monkeypatch, llama)
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    return folder


def test_a_model_is_compiled_once_and_every_layer_captured(tt, model, tmp_path):
    given = (
        "neuron",
        "layers",
        "--model",
        model,
        "--prompt",
        TEXT,
        "--neuron-config",
        "seq_len=32",
    )
    compiled = ("--compiled", tmp_path / "compiled")
    code, printed, _ = tt(*given, *compiled, "--out", tmp_path / "first")
    assert code == 0
    assert "on neuron" in printed
    assert (tmp_path / "compiled" / "tensortap_capture.json").exists()
    code, _, _ = tt(*given, *compiled, "--skip-compile", "--out", tmp_path / "again")
    assert code == 0
    runs = [tmp_path / out / "prompt-0" for out in ("first", "again")]
    with tensortap.open_run(runs[0] / "run") as one, tensortap.open_run(runs[1] / "run") as two:
        assert one.names() == two.names()
        assert len(one.names()) == 4, "the embedding, two layers and the final norm"
        assert one.info.metadata["compiled"] == str(tmp_path / "compiled")
        assert one.info.metadata["neuron_config"] == {"seq_len": 32}
        for name in one.names():
            assert torch.equal(one.tensor(name), two.tensor(name))
    assert (runs[0] / "layers-pt" / "layer_1_output.pt").exists()


def test_what_was_compiled_agrees_with_the_same_model_on_the_cpu(tt, model, tmp_path):
    given = ("neuron", "layers", "--model", model, "--prompt", TEXT)
    assert tt(*given, "--out", tmp_path / "cpu")[0] == 0
    assert tt(*given, "--compiled", tmp_path / "c", "--out", tmp_path / "port")[0] == 0
    code, found, _ = tt(
        "neuron", "compare", "--gpu-path", tmp_path / "cpu", "--neuron-path", tmp_path / "port",
        "--json",
    )  # fmt: skip
    assert code == 0
    assert len(found["prompts"][0]["layers"]) == 4


def test_skip_compile_refuses_what_was_compiled_otherwise(tt, model, tmp_path):
    code, _, error = tt(
        "neuron", "layers", "--model", model, "--prompt", TEXT, "--out", tmp_path / "out",
        "--compiled", tmp_path / "nothing", "--skip-compile",
    )  # fmt: skip
    assert code == 2
    assert "tensortap_capture.json" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--neuron-config", "seq_len=64"), "seq_len is 64 here and 32 there"),
        (("--neuron-config", "seq_len=32", "--dtype", "bf16"),
         "torch_dtype is torch.bfloat16 here and not given there"),
        ((), "seq_len is not given here and 32 there"),
    ],
)  # fmt: skip
def test_skip_compile_refuses_options_it_was_not_compiled_with(tt, model, tmp_path, words, said):
    given = ("neuron", "layers", "--model", model, "--prompt", TEXT, "--compiled", tmp_path / "c")
    assert tt(*given, "--neuron-config", "seq_len=32", "--out", tmp_path / "one")[0] == 0
    code, _, error = tt(*given, *words, "--skip-compile", "--out", tmp_path / "two")
    assert (code, said in error) == (2, True)
    assert not (tmp_path / "two").exists()


def test_what_nxdi_raises_is_one_line(tt, model, tmp_path):
    """An option it does not know; a prompt longer than every bucket."""
    given = ("neuron", "layers", "--model", model, "--compiled", tmp_path / "c")
    code, _, error = tt(
        *given, "--prompt", TEXT, "--neuron-config", "foo=1", "--out", tmp_path / "out"
    )
    assert code == 2
    assert f"--compiled {tmp_path / 'c'}: {model} cannot be compiled" in error
    code, _, error = tt(*given, "--prompt", TEXT * 9, "--out", tmp_path / "out")
    assert code == 2
    assert "cannot run a prompt of 45 tokens" in error
    assert not list(tmp_path.glob("out/*"))
