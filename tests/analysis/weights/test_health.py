import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.analysis.weights.checkpoints import safetensors_folder, small_state
from transformers import MambaConfig, MambaForCausalLM

from tensortap.errors import ConfigError
from tensortap_analysis.weights import ScanResult, Scope
from tensortap_analysis.weights.health import health, health_check
from tensortap_analysis.weights.health.default import typical_condition


def scanned(tmp_path, state, methods="all"):
    save_file({f"{name}.weight": one for name, one in state.items()}, tmp_path / "x.safetensors")
    return Scope(tmp_path / "x.safetensors").scan(methods)


def found(tmp_path, state, preset="default", **thresholds):
    """`{(layer, rule): severity}` of planted weights."""
    report = health(scanned(tmp_path, state), preset, thresholds)
    return {
        (issue.layer, issue.rule): severity
        for severity, issues in report.issues.items()
        for issue in issues
    }


def with_condition(n, condition, dtype=torch.float64):
    """A random matrix of this condition number: singular values in a geometric row."""
    q1, q2 = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2))
    return (q1 * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ q2).to(dtype)


@pytest.mark.parametrize(
    ("condition", "severity"), [(9e3, None), (2e4, "warning"), (2e5, "critical"), (1e9, "critical")]
)
def test_classic_judges_condition_numbers_by_the_older_thresholds(tmp_path, condition, severity):
    issues = found(tmp_path, {"x": with_condition(32, condition)}, "classic")
    assert issues.get(("x", "condition")) == severity


@pytest.mark.parametrize(
    ("share", "severity"), [(0.005, None), (0.02, "warning"), (0.09, "warning")]
)
def test_classic_judges_outliers_by_the_older_thresholds(tmp_path, share, severity):
    x = torch.rand(100, 100) * 1e-3
    x.view(-1)[: round(share * x.numel())] = 1.0
    issues = found(tmp_path, {"x": x[torch.randperm(100)]}, "classic")
    assert issues.get(("x", "outliers")) == severity


def test_classic_calls_more_than_10_percent_of_outliers_critical(tmp_path):
    x = torch.full((100, 100), 1e-9)
    x.view(-1)[:525] = 1.0
    x.view(-1)[525:1050] = -1.0
    assert np.mean(np.abs(x.numpy() - x.numpy().mean()) > 3 * x.numpy().std()) > 0.1
    assert found(tmp_path, {"x": x}, "classic")["x", "outliers"] == "critical"


def test_classic_calls_a_small_stable_rank_redundant(tmp_path):
    spike = torch.randn(64, 64) * 0.01 + torch.ones(64, 64)
    state = {"flat": torch.randn(64, 64), "spike": spike}
    assert found(tmp_path, state, "classic").get(("spike", "redundancy")) == "info"
    assert ("flat", "redundancy") not in found(tmp_path, state, "classic")


@pytest.mark.parametrize(
    ("critical", "warnings", "score", "verdict"),
    [(0, 0, 100, "good"), (1, 3, 81, "good"), (2, 5, 65, "improve"), (4, 1, 57, "do not deploy")],
)
def test_classic_takes_10_for_a_critical_issue_and_3_for_a_warning(
    tmp_path, critical, warnings, score, verdict
):
    state = {"fine": torch.rand(16, 16)}
    state |= {f"c{n}": torch.diag(torch.logspace(0, -6, 3)) for n in range(critical)}
    state |= {f"w{n}": torch.diag(torch.logspace(0, -4.5, 3)) for n in range(warnings)}
    for n, name in enumerate(state):
        state[name] = state[name] * (1 + n)
    report = health(scanned(tmp_path, state), "classic")
    assert (report.score, report.verdict) == (score, verdict)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_classic_calls_layers_without_finite_values_critical(tmp_path, value):
    issues = found(tmp_path, {f"{n}": torch.full((8, 8), value) for n in range(6)}, "classic")
    rule = "not finite" if value else "zero"
    assert issues == {(f"{n}", rule): "critical" for n in range(6)}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_classic_takes_10_for_a_single_value_that_is_not_finite(tmp_path, value):
    x = torch.randn(32, 32)
    x[3, 5] = value
    score, issues = health_check(scanned(tmp_path, {"x": x}), "classic")
    assert (score, [issue.rule for issue in issues["critical"]]) == (90, ["not finite"])


def test_classic_notes_a_rank_far_from_full_and_says_of_what(tmp_path):
    low = torch.randn(256, 4) @ torch.randn(4, 256)
    issues = health(scanned(tmp_path, {"low": low}), "classic").issues["info"]
    [rank] = [issue for issue in issues if issue.rule == "rank"]
    assert rank.cause.startswith("Its rank is 4 of 256:")
    spike = torch.randn(256, 256) * 0.01 + torch.ones(256, 256)
    [issue] = health(scanned(tmp_path, {"x": spike}), "classic").issues["info"]
    assert re.match(r"Its stable rank is 1\.0, and its total rank \d+ of 256\.$", issue.cause)


def test_classic_notes_dead_rows_however_many(tmp_path):
    x = torch.randn(16, 64)
    x[:, :40] = 0
    assert found(tmp_path, {"x": x}, "classic")["x", "dead columns"] == "info"
    x = torch.randn(64, 16)
    x[:40] = 0
    assert found(tmp_path, {"x": x}, "classic")["x", "dead rows"] == "info"


@pytest.mark.parametrize("preset", ["classic", "default"])
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_model_that_exploded_or_vanished_in_all_layers_is_told_for_each(tmp_path, preset, factor):
    state = {f"layers.{n}.q": torch.randn(32, 32) / 6 * factor for n in range(5)}
    state["alone"] = torch.randn(32, 32) / 6 * factor
    state["embed_tokens"] = torch.randn(32, 32) * factor
    issues = found(tmp_path, state, preset)
    severity = "critical" if factor > 1 else "warning"
    assert {key: found for key, found in issues.items() if found != "info"} == {
        (layer, "norm"): severity for layer in state if layer != "embed_tokens"
    }


def test_norms_beyond_float64_have_exploded(tmp_path):
    state = {"x": torch.rand(8, 8, dtype=torch.float64) * 1e308}
    assert found(tmp_path, state) == {("x", "norm"): "critical"}


def test_classic_warns_of_a_layer_unlike_its_peers(tmp_path):
    state = {f"layers.{n}.q": torch.randn(32, 32) / 6 for n in range(6)}
    state["layers.3.q"] = state["layers.3.q"] * 50
    assert found(tmp_path, state, "classic")["layers.3.q", "norm"] == "warning"


def test_classic_scores_do_not_fall_below_0(tmp_path):
    state = {f"c{n}": with_condition(8, 1e8) for n in range(12)}
    report = health(scanned(tmp_path, state), "classic")
    assert (report.score, report.verdict) == (0.0, "do not deploy")


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (64, 128), (50, 1000)])
def test_the_typical_condition_number_is_that_of_normal_matrices(shape):
    draws = [np.linalg.cond(torch.randn(*shape, dtype=torch.float64).numpy()) for _ in range(25)]
    middle = np.exp(np.mean(np.log(draws)))
    assert typical_condition(*shape) == pytest.approx(middle, rel=0.35)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_perfectly_random_model_is_healthy(tmp_path, dtype):
    state = {f"layers.{n}.{m}": torch.randn(256, 256).to(dtype) for n in range(4) for m in "ab"}
    report = health(scanned(tmp_path, state))
    assert (report.score, report.verdict) == (100.0, "good")
    assert not any(report.issues.values())


def test_a_fresh_mamba_is_healthy():
    config = MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=50)
    result = Scope(MambaForCausalLM(config)).scan(["spectral", "sparsity", "norms"])
    report = health(result)
    assert not report.at_least("warning")
    assert not [issue for issue in report.issues["info"] if "A_log" in issue.layer]
    assert health(result, "classic").score == 100
    named = {(one.name, one.method) for one in result.skipped}
    assert ("backbone.layers.0.mixer.A_log", "spectral") in named


def test_a_condition_number_is_judged_against_its_shape(tmp_path):
    state = {"ordinary": with_condition(64, 1e5), "collapsed": with_condition(64, 1e9)}
    issues = found(tmp_path, state)
    assert issues.get(("collapsed", "condition")) == "warning"
    assert ("ordinary", "condition") not in issues
    assert found(tmp_path, state, condition_ratio=10)["ordinary", "condition"] == "warning"


def test_a_condition_number_the_dtype_cannot_resolve_is_counted_and_not_judged(tmp_path):
    report = health(scanned(tmp_path, {"x": with_condition(64, 1e9, torch.bfloat16)}))
    assert not any(issue.rule == "condition" for issue in report.at_least("info"))
    assert report.unresolved == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_critical_in_matrices_and_vectors(tmp_path, value):
    state = {"x": torch.randn(8, 8), "norm": torch.ones(8), "fine": torch.randn(8, 8)}
    state["x"][2, 3] = value
    state["norm"][1] = value
    result = scanned(tmp_path, state)
    report = health(result)
    assert {issue.layer for issue in report.issues["critical"]} == {"x", "norm"}
    assert report.verdict == "do not deploy"
    assert "every output is lost" in report.issues["critical"][0].cause


def test_an_all_zero_matrix_is_critical_and_said_once(tmp_path):
    state = {"x": torch.zeros(8, 8), "lora_B.default": torch.zeros(8, 2), "y": torch.randn(8, 8)}
    issues = found(tmp_path, state)
    assert {key: issues[key] for key in issues if key[0] != "y"} == {
        ("x", "zero"): "critical", ("lora_B.default", "zero"): "info"
    }  # fmt: skip


def test_dead_rows_and_columns_are_counted_and_many_of_them_warn(tmp_path):
    few, many, embedding = torch.randn(40, 40), torch.randn(40, 40), torch.randn(40, 8)
    few[3] = 0
    many[:, :10] = 0
    embedding[20:] = 0
    state = {"few": few, "many": many, "embed_tokens": embedding}
    issues = found(tmp_path, state)
    assert issues["few", "dead rows"] == "info"
    assert issues["many", "dead columns"] == "warning"
    assert issues["embed_tokens", "dead rows"] == "info"


def test_copied_rows_are_noted(tmp_path):
    x = torch.randn(40, 40)
    x[7] = x[3]
    assert found(tmp_path, {"x": x})["x", "copied rows"] == "info"


def test_a_dead_row_is_told_as_such_and_not_as_a_condition_number(tmp_path):
    x = torch.randn(32, 32)
    x[4] = 0
    assert found(tmp_path, {"x": x}) == {("x", "dead rows"): "info"}
    x[:, 7] = 0
    assert ("x", "condition") not in found(tmp_path, {"x": x})
    x[:, 20:] = x[:, :12]
    assert found(tmp_path, {"x": x})["x", "condition"] == "warning"


def test_layers_with_the_same_values_are_noted(tmp_path):
    x = torch.randn(8, 8)
    issues = found(
        tmp_path, {"layers.0.q": x, "layers.1.q": x.clone(), "layers.2.q": x.T.contiguous()}
    )
    assert {layer for layer, rule in issues if rule == "copy"} == {"layers.1.q"}


def test_every_layer_of_a_diverged_model_is_critical(tmp_path):
    issues = found(tmp_path, {f"layers.{n}.q": torch.full((8, 8), math.nan) for n in range(5)})
    assert issues == {(f"layers.{n}.q", "not finite"): "critical" for n in range(5)}


def int8_by_row(x):
    x = x.double().numpy()
    scale = np.abs(x).max(1, keepdims=True) / 127
    rounded = np.rint(x / scale) * scale
    return 10 * np.log10((x**2).sum() / ((x - rounded) ** 2).sum())


def with_outliers(rows, columns, size):
    """Normal values, and one of this size in each row."""
    x = torch.randn(rows, columns)
    x[:, 7] = size
    return x


@pytest.mark.parametrize(
    ("x", "severity"),
    [
        (with_outliers(32, 1024, 5), None),
        (with_outliers(32, 1024, 40), "warning"),
        (with_outliers(4, 16384, 150), "critical"),
    ],
)
def test_channels_that_int8_cannot_hold_are_judged_by_what_it_leaves(tmp_path, x, severity):
    report = health(scanned(tmp_path, {"x": x}))
    issues = [issue for issue in report.at_least("info") if issue.rule == "sqnr"]
    assert [issue.severity for issue in issues] == [severity] * (severity is not None)
    for issue in issues:
        assert issue.value == pytest.approx(int8_by_row(x), abs=0.01)


def test_what_one_scale_cannot_hold_and_one_a_channel_can_is_only_a_note(tmp_path):
    x = torch.randn(128, 128)
    x[5, 5] = 60
    issues = found(tmp_path, {"x": x})
    assert issues["x", "sqnr_tensor"] == "info"
    assert ("x", "sqnr") not in issues


def test_a_layer_unlike_its_peers_has_exploded_or_vanished(tmp_path):
    state = {f"layers.{n}.q_proj": torch.randn(16, 16) for n in range(8)}
    state["layers.3.q_proj"] *= 20
    state["layers.5.q_proj"] /= 30
    state |= {f"layers.{n}.v_proj": torch.randn(16, 16) * 20 for n in range(8)}
    report = health(scanned(tmp_path, state))
    causes = {issue.layer: issue.cause for issue in report.issues["warning"]}
    assert set(causes) == {"layers.3.q_proj", "layers.5.q_proj"}
    assert "exploded" in causes["layers.3.q_proj"]
    assert "vanished" in causes["layers.5.q_proj"]


def test_norms_that_grow_with_the_depth_are_ordinary(tmp_path):
    state = {f"layers.{n}.down_proj": torch.randn(16, 16) / 4 * 1.5**n for n in range(12)}
    assert not found(tmp_path, state)


def test_few_layers_have_no_peers(tmp_path):
    state = {f"layers.{n}.q_proj": torch.randn(16, 16) / 40 * 20**n for n in range(3)}
    assert not found(tmp_path, state)


def test_a_low_rank_is_noted_by_its_energy_and_its_rank(tmp_path):
    x = torch.randn(64, 4, dtype=torch.float64) @ torch.randn(4, 64, dtype=torch.float64)
    issues = found(tmp_path, {"exact": x, "full": torch.randn(64, 64)})
    assert issues["exact", "rank"] == "warning"
    assert issues["exact", "redundancy"] == "info"
    assert not any(layer == "full" for layer, _ in issues)


def test_values_at_the_end_of_float16_warn(tmp_path):
    x = torch.randn(16, 16).half()
    x[0, 0] = 65504
    assert found(tmp_path, {"x": x, "y": torch.randn(16, 16)})["x", "range"] == "warning"


def test_the_default_score_is_an_average_over_layers(tmp_path):
    sick = torch.randn(40, 40)
    sick[:, :10] = 0
    small = {"sick": sick, "fine": torch.randn(40, 40)}
    large = {**small, **{f"more{n}": torch.randn(40, 40) for n in range(8)}}
    assert health(scanned(tmp_path, small)).score == pytest.approx(79 * 0.85)
    assert health(scanned(tmp_path, large)).score == pytest.approx(79 * 0.97)


def test_anything_critical_keeps_a_model_from_being_called_good(tmp_path):
    state = {f"l{n}": torch.randn(8, 8) for n in range(99)} | {"dead": torch.zeros(8, 8)}
    report = health(scanned(tmp_path, state))
    assert report.score == pytest.approx(59 * 0.99)
    assert report.verdict == "do not deploy"


def test_a_model_with_any_warning_is_not_called_good_and_one_with_notes_is(tmp_path):
    state = {f"layers.{n}.q_proj": torch.randn(64, 64) / 8 for n in range(150)}
    state["layers.7.q_proj"][3] = 0
    assert health(scanned(tmp_path, state)).score == 100
    for sick in (torch.randn(64, 2) @ torch.randn(2, 64) / 8, torch.randn(64, 64) * 5):
        report = health(scanned(tmp_path, state | {"layers.9.q_proj": sick}))
        assert report.issues["warning"]
        assert (round(report.score), report.verdict) == (79, "improve")


def test_the_worst_issue_comes_first(tmp_path):
    state = {f"c{power}": with_condition(16, 10.0**power) for power in (6, 9, 7)}
    report = health(scanned(tmp_path, state), "classic")
    assert [one.layer for one in report.issues["critical"]] == ["c9", "c7", "c6"]


def test_every_issue_has_a_cause_and_a_remedy_in_whole_sentences(tmp_path):
    x = torch.randn(40, 40)
    x[:, :10] = 0
    x[0] = x[1]
    for preset in ("default", "classic"):
        for issue in health(scanned(tmp_path, {"x": x}), preset).at_least("info"):
            assert issue.cause[0].isupper() or issue.cause[0].isdigit()
            assert issue.cause.endswith(".")
            assert issue.remedy.endswith((".", "?"))
            assert str(issue) == f"x: {issue.cause} {issue.remedy}"


def test_health_check_takes_a_report_a_scan_or_a_model(tmp_path):
    result = scanned(tmp_path, {"x": torch.zeros(8, 8)})
    result.save(tmp_path / "report.json")
    for model in (tmp_path / "report.json", result, tmp_path / "x.safetensors"):
        score, issues = health_check(model)
        assert score == 0.0
        assert [issue.rule for issue in issues["critical"]] == ["zero"]
        assert set(issues) == {"critical", "warning", "info"}


def test_health_check_takes_an_index_of_shards_as_the_model_that_it_is(tmp_path):
    safetensors_folder(tmp_path / "m", small_state(), 2)
    score, _ = health_check(tmp_path / "m" / "model.safetensors.index.json")
    assert score == health_check(tmp_path / "m")[0]


def test_a_saved_report_gives_the_same_health(tmp_path):
    x = torch.randn(40, 40)
    x[:, :10] = 0
    result = scanned(tmp_path, {"x": x, "y": with_condition(32, 1e12)})
    result.save(tmp_path / "r.json")
    for preset in ("default", "classic"):
        assert health(ScanResult.load(tmp_path / "r.json"), preset) == health(result, preset)


def test_what_was_not_measured_is_said_and_not_judged(tmp_path):
    report = health(scanned(tmp_path, {"x": torch.zeros(8, 8)}, "spectral,quantization"))
    assert report.unmeasured == ("sparsity", "norms")


@pytest.mark.parametrize(
    ("preset", "thresholds", "words"),
    [
        ("strict", {}, "no preset 'strict'"),
        ("default", {"sqnr": 3.0}, "no threshold 'sqnr'"),
        ("classic", {"stable_ratio": -1.0}, "a number above 0"),
    ],
)
def test_a_preset_or_threshold_there_is_not_is_said(tmp_path, preset, thresholds, words):
    with pytest.raises(ConfigError, match=words):
        health(scanned(tmp_path, {"x": torch.randn(4, 4)}), preset, thresholds)
