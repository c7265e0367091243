import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tests.analysis.weights.checkpoints import read, safetensors_folder
from transformers import GPT2Config, GPT2LMHeadModel

EXAMPLES = Path(__file__).parents[3] / "examples" / "weights"


def test_the_five_cases_are_found_and_named(capsys):
    runpy.run_path(str(EXAMPLES / "five_cases.py"))["main"]()
    parts = capsys.readouterr().out.split("\n\n")
    assert len(parts) == 5
    for part, rule, layers in zip(
        parts,
        (
            "condition number is",
            "int8 leaves",
            "has exploded",
            "rank 8 leaves 0.0%",
            "rows are all 0",
        ),
        (("2",), ("4",), ("1", "5"), ("3",), ("0",)),
        strict=True,
    ):
        assert rule in part
        for layer in layers:
            assert f"layers.{layer}." in part


def test_a_model_goes_through_the_workflow_before_release(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=2, n_head=2, vocab_size=64))
    model.save_pretrained(tmp_path / "m")
    words = [
        "before_release.py",
        str(tmp_path / "m"),
        "--out",
        str(tmp_path / "out"),
        "--sqnr",
        "15",
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert runpy.run_path(str(EXAMPLES / "before_release.py"))["main"]() == 0
    out = capsys.readouterr().out
    assert "before: score 100, good" in out
    assert "after: score" in out
    plan = json.loads((tmp_path / "out" / "quantization.json").read_text())
    [(_, group)] = plan["config_groups"].items()
    assert "transformer.h.0.attn.c_attn" in group["targets"]
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "quantised")
    apart = again.transformer.h[0].mlp.c_fc.weight - model.transformer.h[0].mlp.c_fc.weight
    assert 0 < apart.norm() / model.transformer.h[0].mlp.c_fc.weight.norm() < 10 ** (-15 / 20)
    assert torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)


def test_a_critical_issue_is_the_exit_code_of_the_workflow(tmp_path, monkeypatch, capsys):
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.zero_()
    model.save_pretrained(tmp_path / "m")
    words = ["before_release.py", str(tmp_path / "m"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "before_release.py"), run_name="__main__")
    assert stopped.value.code == 1
    assert "All its values are 0" in capsys.readouterr().out


def test_the_copy_of_a_model_in_float8_is_read_as_the_values_it_holds(tmp_path, monkeypatch):
    torch.manual_seed(0)
    codes = torch.randn(128, 128).to(torch.float8_e4m3fn)
    state = {"x.weight": codes, "x.weight_scale_inv": torch.tensor([[0.5]])}
    state["n.weight"] = torch.ones(9)
    config = {"hidden_size": 128, "quantization_config": {"weight_block_size": [128, 128]}}
    folder = safetensors_folder(tmp_path / "m", state, config=config)
    words = ["before_release.py", str(folder), "--out", str(tmp_path / "out"), "--sqnr", "200"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(EXAMPLES / "before_release.py"))["main"]()
    copy = tmp_path / "out" / "quantised"
    assert json.loads((copy / "config.json").read_text()) == {"hidden_size": 128}
    found = read(copy)
    assert found["x.weight"].dtype == torch.bfloat16
    assert torch.equal(found["x.weight"].float(), codes.float() * 0.5)
    assert torch.equal(found["n.weight"], torch.ones(9))
