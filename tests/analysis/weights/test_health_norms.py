import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Dinov2Config,
    Dinov2Model,
    ViTMAEConfig,
    ViTMAEModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from tensortap_analysis.weights import Scope
from tensortap_analysis.weights.health import health

ROLES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def model(layers=4, hidden=64):
    torch.manual_seed(0)
    names = [f"model.layers.{n}.{role}" for n in range(layers) for role in ROLES]
    return {name: torch.randn(hidden, hidden) * 0.02 for name in names}


def report(tmp_path, state, preset="default"):
    save_file({f"{name}.weight": one for name, one in state.items()}, tmp_path / "x.safetensors")
    return health(Scope(tmp_path / "x.safetensors").scan(), preset)


K = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize("layers", [1, 2, 4, 12])
@pytest.mark.parametrize("preset", ["default", "classic"])
def test_a_layer_a_thousand_times_too_large_is_critical_with_peers_and_without(
    tmp_path, layers, preset
):
    state, k = model(layers), K.replace("1", "0")
    state[k] *= 1000
    found = report(tmp_path, state, preset)
    assert [(issue.layer, issue.rule) for issue in found.issues["critical"]] == [(k, "norm")]
    assert all(issue.rule == "condition" for issue in found.issues["warning"])
    assert preset == "classic" or found.verdict == "do not deploy"


@pytest.mark.parametrize(("factor", "severity"), [(3, None), (20, "warning"), (1e-3, "warning")])
def test_a_layer_that_is_odd_among_its_peers_warns(tmp_path, factor, severity):
    state = model()
    state[K] *= factor
    found = report(tmp_path, state)
    assert [issue.severity for issue in found.at_least("warning")] == [severity] * bool(severity)


def test_a_column_that_stands_out_is_named_where_it_made_the_norm(tmp_path):
    state = model()
    state[K][:, 17] *= 60
    [issue] = report(tmp_path, state).at_least("warning")[:1]
    assert issue.layer == K
    causes = [issue.cause for issue in report(tmp_path, state).at_least("info")]
    named = [cause for cause in causes if "Column 17 is" in cause]
    [norm] = [cause for cause in named if "root mean square" in cause]
    assert "it has grown in a few places. Column 17 is 6" in norm
    assert "times the median column" in norm
    assert "exploded" not in norm


def test_columns_that_int8_cannot_hold_are_named(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(512, 2048) * 0.02
    x[:, 7] *= 60
    x[:, 1900] *= 30
    [issue] = report(tmp_path, {"x": x}).at_least("warning")
    assert issue.rule == "sqnr"
    assert "Column 7 is 5" in issue.cause or "Column 7 is 6" in issue.cause
    assert issue.cause.endswith("times the median column; 1 more stand out.")


def test_a_row_that_stands_out_is_named_where_one_scale_cannot_hold_it(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(256, 256) * 0.02
    x[130] *= 100
    [issue] = [one for one in report(tmp_path, {"x": x}).at_least("info") if one.rule[0] == "s"]
    assert "Row 130 is" in issue.cause


def test_the_expert_of_a_column_is_named_with_it(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 64, 1024) * 0.02
    x[2, :, 9] *= 200
    issues = report(tmp_path, {"mlp.experts.down_proj": x}).at_least("info")
    assert any("Column 9 of expert 2 is" in issue.cause for issue in issues)


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64
}  # fmt: skip
IMAGES = {**SMALL, "image_size": 32, "patch_size": 16}


@pytest.mark.parametrize("preset", ["default", "classic"])
@pytest.mark.parametrize(
    "fresh",
    [
        lambda: Dinov2Model(Dinov2Config(**IMAGES)),
        lambda: ViTMAEModel(ViTMAEConfig(**IMAGES)),
        lambda: Wav2Vec2Model(
            Wav2Vec2Config(**SMALL, conv_dim=(64,) * 7, num_conv_pos_embeddings=16)
        ),
    ],
)
def test_tokens_that_begin_at_zero_and_convolutions_of_different_widths_are_healthy(fresh, preset):
    torch.manual_seed(0)
    found = health(Scope(fresh()).scan("norms,sparsity"), preset)
    assert not [str(issue) for issue in found.at_least("warning")]


def test_a_convolution_that_exploded_among_others_of_different_widths_is_named():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.convs = torch.nn.ModuleList(
        torch.nn.ModuleDict({"conv": torch.nn.Conv1d(1 if n == 0 else 32, 32, 8)}) for n in range(6)
    )
    with torch.no_grad():
        model.convs[3]["conv"].weight *= 40
    found = health(Scope(model).scan("norms,sparsity"))
    assert [issue.layer for issue in found.at_least("warning")] == ["convs.3.conv"]
