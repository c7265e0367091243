"""Gains of normalisations are judged, and healthy ones are left alone."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2Model,
)

from tensortap_analysis.weights import ScanResult, Scope
from tensortap_analysis.weights.health import health

HIDDEN = 256
NORM = "model.layers.1.input_layernorm"
NORMS = ("input_layernorm", "post_attention_layernorm")


def llama(layers=6, gain=lambda layer: 0.3 + 0.05 * layer):
    """Small matrices, and gains that grow with the depth as those of trained models do."""
    torch.manual_seed(0)
    state = {"model.norm.weight": 2 + 0.1 * torch.randn(HIDDEN)}
    for n in range(layers):
        for role in NORMS:
            state[f"model.layers.{n}.{role}.weight"] = gain(n) * (1 + 0.1 * torch.randn(HIDDEN))
        state[f"model.layers.{n}.mlp.up_proj.weight"] = torch.randn(64, 64) / 8
    return state


def report(tmp_path, state, preset="default", select="*"):
    save_file(state, tmp_path / "model.safetensors")
    return health(
        Scope(tmp_path / "model.safetensors").scan("norms,sparsity", select=select), preset
    )


@pytest.mark.parametrize("preset", ["default", "classic"])
@pytest.mark.parametrize("layers", [2, 3, 6])
@pytest.mark.parametrize(
    ("factor", "severity"),
    [(50, "warning"), (500, "critical"), (0, "critical"), (1e-4, "warning")],
)
def test_gains_that_exploded_vanished_or_are_zero_are_named(
    tmp_path, preset, layers, factor, severity
):
    state = llama(layers, gain=lambda layer: 1.0)
    state[f"{NORM}.weight"] *= factor
    [issue] = report(tmp_path, state, preset).at_least("info")
    assert (issue.layer, issue.severity) == (NORM, severity)


@pytest.mark.parametrize("layers", [2, 6])
def test_gains_fifty_times_those_of_others_warn(tmp_path, layers):
    state = llama(layers, gain=lambda layer: 1.0)
    state[f"{NORM}.weight"] *= 50
    [issue] = report(tmp_path, state).at_least("info")
    assert (issue.layer, issue.severity) == (NORM, "warning")
    assert "50" in issue.cause
    assert "exploded" in issue.cause


@pytest.mark.parametrize("layers", [2, 6])
def test_one_channel_that_drowns_the_others_is_named_with_its_place(tmp_path, layers):
    state = llama(layers)
    state[f"{NORM}.weight"][17] = 500
    [issue] = report(tmp_path, state).at_least("info")
    assert (issue.layer, issue.severity) == (NORM, "warning")
    assert "Value [17] is 500 in magnitude" in issue.cause


def test_an_attention_whose_norm_is_zero_is_dead_and_the_model_is_not_good(tmp_path):
    state = llama()
    state[f"{NORM}.weight"].zero_()
    result = report(tmp_path, state)
    [issue] = result.issues["critical"]
    assert "sees nothing of its input" in issue.cause
    assert result.verdict == "do not deploy"


def test_gains_of_which_many_are_zero_are_named(tmp_path):
    state = llama()
    state[f"{NORM}.weight"][:64] = 0
    [issue] = report(tmp_path, state).at_least("info")
    assert "64 of its 256 gains are 0 (0, 1, 2, 3 and 60 more)" in issue.cause


@pytest.mark.parametrize(
    "gain",
    [
        lambda layer: 0.03 if layer == 0 else 0.3 + 0.02 * layer,  # Llama 2 begins small
        lambda layer: 1.35**layer,  # grown with the depth: 1 to 26
        lambda layer: 30.0,
    ],
)
def test_gains_as_trained_models_have_them_are_healthy(tmp_path, gain):
    state = llama(12, gain)
    for layer in range(12):
        state[f"model.layers.{layer}.input_layernorm.weight"][77] *= 25
    assert not report(tmp_path, state).at_least("info")


def test_the_first_channel_of_outliers_that_all_depths_share_is_healthy(tmp_path):
    state = llama(8)
    for layer in range(8):
        state[f"model.layers.{layer}.post_attention_layernorm.weight"][5] = 90.0 + layer
    assert not report(tmp_path, state).at_least("info")


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2Model(GPT2Config(n_embd=32, n_layer=5, n_head=2, vocab_size=50)),
        lambda: BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=5, num_attention_heads=2,
                       intermediate_size=64, vocab_size=50)
        ),
        lambda: nn.Sequential(nn.Linear(16, 16), nn.PReLU(16), nn.BatchNorm1d(16)),
    ],
)  # fmt: skip
def test_gains_of_fresh_models_are_healthy(model):
    torch.manual_seed(0)
    scan = Scope(model()).scan("norms,sparsity")
    assert not [issue for issue in health(scan).at_least("info") if "gain" in issue.rule]
    assert not health(scan).issues["critical"]


def gemma():
    torch.manual_seed(0)
    return GemmaForCausalLM(
        GemmaConfig(hidden_size=32, num_hidden_layers=5, num_attention_heads=2, head_dim=16,
                    num_key_value_heads=1, intermediate_size=64, vocab_size=50)
    )  # fmt: skip


def test_gains_that_are_stored_less_1_may_be_zero(tmp_path):
    model = gemma()
    model.save_pretrained(tmp_path / "gemma")
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight += 60
    for where, sick in ((tmp_path / "gemma", []), (model, ["model.layers.2.input_layernorm"])):
        result = Scope(where).scan("norms,sparsity")
        assert result.facts["model.norm"].offset == 1
        issues = [one.layer for one in health(result).at_least("info") if "embed" not in one.layer]
        assert issues == sick


def test_a_model_whose_gains_are_all_zero_is_said_to_be_fresh_or_dead(tmp_path):
    state = llama()
    for name in state:
        if "norm" in name:
            state[name].zero_()
    issues = report(tmp_path, state).at_least("info")
    assert {issue.severity for issue in issues} == {"info"}
    assert "Does the model add 1?" in issues[0].remedy
    # One kind of them alone is not how any model begins.
    for role in NORMS[1:]:
        for n in range(6):
            state[f"model.layers.{n}.{role}.weight"] += 1
    assert len(report(tmp_path, state).issues["critical"]) == 7


O_PROJ = "model.layers.3.self_attn.o_proj"


def matrices(layers):
    torch.manual_seed(0)
    roles = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    return {
        f"model.layers.{n}.{role}.weight": torch.randn(64, 64) * 0.02
        for n in range(layers)
        for role in roles
    }


@pytest.mark.parametrize("select", ["*", "*layers.3.*", "*o_proj"])
@pytest.mark.parametrize("preset", ["default", "classic"])
def test_a_selection_is_held_against_the_peers_that_were_not_selected(tmp_path, preset, select):
    state = matrices(6)
    state[f"{O_PROJ}.weight"] *= 40
    [issue] = report(tmp_path, state, preset, select).at_least("warning")
    assert (issue.layer, issue.rule) == (O_PROJ, "norm")


def test_a_zero_gain_of_a_selection_is_critical_and_peers_are_not_reported(tmp_path):
    state = llama()
    state[f"{NORM}.weight"].zero_()
    sick = report(tmp_path, state, select="*layers.1.*")
    assert [issue.layer for issue in sick.at_least("info")] == [NORM]
    assert not report(tmp_path, state, select="*layers.2.*").at_least("info")


def test_the_peers_of_a_selection_are_saved_with_it(tmp_path):
    state = matrices(20)
    state[f"{O_PROJ}.weight"] *= 40
    save_file(state, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan("norms", select="*layers.3.*", parallel=2)
    assert set(result) == {name.removesuffix(".weight") for name in state if "layers.3." in name}
    assert len(result.peers) == 3 * 7
    assert "norms of 21 weights that were not selected were measured too" in result.notes[-1]
    result.save(tmp_path / "r.json")
    loaded = ScanResult.load(tmp_path / "r.json")
    assert loaded == result
    assert health(loaded) == health(result)
    document = json.loads((tmp_path / "r.json").read_text())
    del document["peers"]
    assert not ScanResult.from_json(document).peers


@pytest.mark.parametrize("layers", [2, 3])
def test_in_a_small_model_a_layer_far_too_large_is_critical(tmp_path, layers):
    state = matrices(layers)
    name = "model.layers.1.self_attn.o_proj"
    state[f"{name}.weight"] *= 800
    result = report(tmp_path, state)
    assert [(issue.layer, issue.rule) for issue in result.at_least("info")] == [(name, "norm")]
    assert result.issues["critical"]


def test_what_has_too_few_peers_is_said(tmp_path):
    assert not report(tmp_path, matrices(4)).unjudged
    [sentence] = report(tmp_path, matrices(3)).unjudged
    assert "fewer than 4 depths of mlp.up_proj and 2 more roles to compare sizes" in sentence
