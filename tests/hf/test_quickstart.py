"""The example runs as printed: without an argument, and with a local model."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tensortap

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart_hf.py"


def run_example(where: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tensortap.Run:
    """Run it as a script; the one run it has recorded under `where`."""
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), *arguments])
    monkeypatch.setenv("TENSORTAP_DIR", str(where))
    monkeypatch.setenv("COLUMNS", "200")
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    (path,) = where.iterdir()
    return tensortap.open_run(path)


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 40


def test_by_default_it_trains_a_small_model_and_prints_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_example(tmp_path / "runs", monkeypatch)
    printed = capsys.readouterr().out
    assert all(f"layers.{index}" in printed for index in range(4))
    assert "NaN/Inf" in printed
    assert str(tmp_path / "runs") in printed
    kept = {record.name.module.split(".")[1] for record in run.records() if record.payload}
    assert kept == {"0", "1"}
    assert {record.at.step for record in run.records()} == {0, 1}
    assert run.tensor("layers.1.attn.core/forward/query", step=1).shape == (2, 4, 128, 16)


def test_it_takes_a_model_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Any
) -> None:
    letters = {letter: index + 3 for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **letters}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = str(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    build("gpt2", n_positions=128).save_pretrained(folder)
    run = run_example(tmp_path / "runs", monkeypatch, folder)
    assert "layers.0.attn.qkv/forward/output" in {str(name) for name in run.names()}
