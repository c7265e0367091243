import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.analysis.browser import CHROMIUM, DRIVER, chromium
from tests.analysis.weights.checkpoints import safetensors_folder, small_state

from tensortap import formats
from tensortap.errors import ConfigError
from tensortap_analysis.weights import Options, ScanResult, Scope
from tensortap_analysis.weights.drift import alerts, overall_alerts, track
from tensortap_analysis.weights.health import health
from tensortap_analysis.weights.report import histograms, write_scan_report
from tensortap_analysis.weights.report.drift_page import write_drift_report
from tensortap_analysis.weights.report.spread import worst_layers

HOSTILE = "x.<img src=x onerror=hacked=1></script><script>hacked=1</script>"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    state = small_state(hidden=32)
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 32)
    state[f"{HOSTILE}.weight"] = torch.randn(32, 32)
    return safetensors_folder(tmp_path / "m", state)


def written(folder, out, *, full_spectrum=False, values=True):
    scope = Scope(folder)
    result = scope.scan(options=Options(full_spectrum=full_spectrum))
    found = histograms(scope.weights(), worst_layers(result)) if values else []
    write_scan_report(out, result, health(result), found)
    return result, out.read_text()


def blocks(page):
    """The data of the page's charts and table, by identifier."""
    found = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', page, re.S)
    return {name: json.loads(text) for name, text in found}


def test_the_table_has_every_layer_with_the_metrics_of_the_scan(folder, tmp_path):
    result, page = written(folder, tmp_path / "r.html")
    table = blocks(page)["tensors-data"]
    keys = [column["key"] for column in table["columns"]]
    assert [row[0] for row in table["rows"]] == list(result)
    row = table["rows"][list(result).index("lm_head")]
    found = result["lm_head"]["spectral"]["condition_number"]
    assert row[keys.index("condition_number")] == pytest.approx(found, rel=1e-4)


def test_the_summary_says_the_score_and_the_issues_what_to_do(folder, tmp_path):
    result, page = written(folder, tmp_path / "r.html")
    assert f"{health(result).score:.0f} of 100" in page
    assert "do not deploy (default)" in page
    assert "All its values are 0: nothing passes through it." in page
    assert "a vector has no spectrum" in page


def test_names_from_a_checkpoint_are_only_text(folder, tmp_path):
    _, page = written(folder, tmp_path / "r.html")
    assert "<img src=x" not in page
    assert "<script>hacked" not in page


def test_ranks_show_the_error_that_is_left_by_each(folder, tmp_path):
    _, page = written(folder, tmp_path / "r.html")
    lines = {line["name"]: line for line in blocks(page)["ranks-data"]["data"]}
    weight = Scope(folder).weights("lm_head")[0].read().double().numpy()
    s = np.linalg.svd(weight, compute_uv=False)
    for share, error in zip(lines["lm_head"]["x"], lines["lm_head"]["y"], strict=True):
        rank = round(share * 32)
        assert error == pytest.approx(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()), abs=1e-6)


def test_formats_show_quartiles_over_layers_and_name_the_worst(folder, tmp_path):
    result, page = written(folder, tmp_path / "r.html")
    box, worst = blocks(page)["formats-data"]["data"]
    sqnr = {
        layer: stats["quantization"]["formats"]["mxfp4"]
        for layer, stats in result.items()
        if stats["quantization"]["formats"] and layer != "model.layers.1.mlp.up_proj"
    }
    at = box["x"].index("mxfp4")
    assert box["median"][at] == pytest.approx(np.median(list(sqnr.values())))
    assert box["lowerfence"][at] == min(sqnr.values())
    lowest = min(sqnr, key=sqnr.get)
    assert any(lowest in text and "mxfp4" in text for text in worst["hovertext"])


def test_spectra_are_drawn_where_the_scan_has_kept_them(folder, tmp_path):
    _, without = written(folder, tmp_path / "r.html")
    _, page = written(folder, tmp_path / "f.html", full_spectrum=True)
    assert "spectra-data" not in blocks(without)
    lines = {line["name"]: line for line in blocks(page)["spectra-data"]["data"]}
    s = np.linalg.svd(Scope(folder).weights("lm_head")[0].read().double().numpy())[1]
    assert lines["lm_head"]["y"] == pytest.approx((s / s[0]).tolist(), rel=1e-6)


def test_the_map_marks_the_worst_layer_of_a_metric(tmp_path):
    torch.manual_seed(0)
    state = {f"layers.{n}.weight": torch.randn(16, 16) for n in range(5)}
    state["layers.3.weight"][:, 0] *= 1e-6
    save_file(state, tmp_path / "x.safetensors")
    _, page = written(tmp_path / "x.safetensors", tmp_path / "r.html")
    [heat] = blocks(page)["layers-metrics-data"]["data"]
    row = heat["z"][heat["y"].index("condition number")]
    assert row[3] == max(row) == 1
    assert min(row) == 0


def test_histograms_count_values_and_show_where_formats_have_theirs(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    save_file({"x.weight": x}, tmp_path / "x.safetensors")
    [found] = histograms(Scope(tmp_path / "x.safetensors").weights(), ["x"])
    counts, _ = np.histogram(x.numpy(), found.edges)
    assert found.counts.tolist() == counts.tolist()
    assert found.counts.sum() == x.numel()
    block = x.view(-1, 16).abs().amax(1).median()
    levels = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = found.grids["nvfp4"]
    assert len(grid) == 15
    assert grid.max() == pytest.approx(block.item(), rel=0.07)
    np.testing.assert_allclose(np.abs(grid[7:]) / grid.max() * 6, levels, atol=1e-6)
    assert len(found.grids["int4"]) == 15
    for name, values in found.grids.items():
        assert len(values) <= 16
        assert formats.get(name)


def test_a_large_layer_is_sampled_by_whole_rows_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("tensortap_analysis.weights.report.spread._VALUES", 1000)
    save_file({"x.weight": torch.randn(64, 100)}, tmp_path / "x.safetensors")
    [found] = histograms(Scope(tmp_path / "x.safetensors").weights(), ["x"])
    assert found.counts.sum() == 1000
    assert found.share == pytest.approx(10 / 64)


def test_a_saved_scan_makes_a_report_without_histograms(folder, tmp_path):
    result, _ = written(folder, tmp_path / "r.html")
    result.save(tmp_path / "r.json")
    again = ScanResult.load(tmp_path / "r.json")
    write_scan_report(tmp_path / "s.html", again, health(again))
    assert not any(
        name.startswith("histogram") for name in blocks((tmp_path / "s.html").read_text())
    )


def test_a_scan_of_nan_infinity_and_zeros_makes_a_report(tmp_path):
    state = {f"l{n}": torch.randn(16, 16) for n in range(3)}
    state["l0"][0, 0] = torch.nan
    state["l1"][0, 0] = torch.inf
    state["l2"][:] = 0
    save_file({f"{name}.weight": one for name, one in state.items()}, tmp_path / "x.safetensors")
    _, page = written(tmp_path / "x.safetensors", tmp_path / "r.html", full_spectrum=True)
    assert blocks(page)["tensors-data"]["rows"]


@pytest.mark.parametrize("name", ["r.pdf", "no/r.html"])
def test_a_name_that_cannot_be_written_is_said(folder, tmp_path, name):
    result = Scope(folder).scan("norms")
    with pytest.raises(ConfigError, match="--html"):
        write_scan_report(tmp_path / name, result, health(result))


@pytest.fixture
def checkpoints(tmp_path):
    """Three of one model: one layer doubles at each step, another does not move."""
    torch.manual_seed(0)
    state, paths = small_state(layers=2), []
    for step in range(3):
        state["lm_head.weight"] = state["lm_head.weight"] * 2
        state["model.layers.0.mlp.up_proj.weight"] = torch.randn(64, 16)
        paths.append(safetensors_folder(tmp_path / f"step{step}", state))
    return paths


def drifted(checkpoints, out):
    steps = track([Scope(path) for path in checkpoints])
    issues = [*(alerts(step) for step in steps), overall_alerts(steps)]
    write_drift_report(out, steps, issues)
    return steps, issues, out.read_text()


def test_drift_shows_every_weight_at_every_step(checkpoints, tmp_path):
    steps, issues, page = drifted(checkpoints, tmp_path / "d.html")
    found = blocks(page)
    rows = {(row[0], row[1]): row for row in found["tensors-data"]["rows"]}
    assert set(rows) == {(layer, step) for step in (1, 2) for layer in steps[0].layers}
    assert rows["lm_head", 2][4] == 2.0
    [heat] = found["changes-data"]["data"]
    assert heat["z"][heat["y"].index("lm_head")] == pytest.approx([0, 0], abs=1e-9)
    assert heat["z"][heat["y"].index("model.embed_tokens")] == [None, None]
    lines = {line["name"]: line["y"] for line in found["norms-data"]["data"]}
    assert lines["lm_head"] == pytest.approx([1, 2, 4])
    assert found["changes-data"]["layout"]["xaxis"]["ticktext"] == ["step1", "step2"]
    assert found["norms-data"]["layout"]["xaxis"]["ticktext"] == ["step0", "step1", "step2"]
    assert any(issue.cause.split(":")[0] in page for some in issues for issue in some)


def test_weights_that_begin_or_break_are_drawn_as_far_as_they_can_be(tmp_path):
    states = [{"a.weight": torch.eye(8), "a.bias": torch.zeros(8)} for _ in range(3)]
    states[1]["a.bias"], states[2]["a.bias"] = torch.ones(8), torch.full((8,), 4.0)
    states[2]["a.weight"][0, 0] = torch.nan
    paths = [safetensors_folder(tmp_path / f"s{n}", state) for n, state in enumerate(states)]
    _, _, page = drifted(paths, tmp_path / "d.html")
    found = blocks(page)
    lines = {line["name"]: (line["x"], line["y"]) for line in found["norms-data"]["data"]}
    assert lines == {"a": ([0, 1], [1, 1]), "a.bias": ([0, 1, 2], [None, 1, pytest.approx(4)])}
    [heat] = found["changes-data"]["data"]
    at = heat["y"].index("a.bias")
    assert heat["z"][at][0] is None
    assert heat["hovertext"][at][0] == "a.bias<br>s1: from 0"


def test_what_is_to_say_of_many_weights_is_said_once(checkpoints, tmp_path):
    _, _, page = drifted([checkpoints[0], checkpoints[0]], tmp_path / "d.html")
    assert page.count("Not one of its values changed.") == 1
    assert "are they the same checkpoint?" in page


def test_two_checkpoints_that_are_equal_make_a_report(checkpoints, tmp_path):
    _, _, page = drifted([checkpoints[0], checkpoints[0]], tmp_path / "d.html")
    assert "changes-data" not in blocks(page)
    assert "norms-data" in blocks(page)


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")
@pytest.mark.xdist_group("chromium")
def test_a_browser_shows_them_without_an_error(folder, checkpoints, tmp_path):
    written(folder, tmp_path / "r.html", full_spectrum=True)
    with chromium() as browser:
        browser.console()
        browser.open(tmp_path / "r.html")
        assert browser.console() == []
        assert browser.script("return window.hacked") is None
        drawn = "return document.querySelectorAll('.chart .main-svg').length"
        assert browser.script(drawn) >= 2 * 6
        browser.type("#search", "lm_head")
        rows = "return document.querySelectorAll('#tensors-table tbody tr').length"
        assert browser.script(rows) == 1
        drifted(checkpoints, tmp_path / "d.html")
        browser.open(tmp_path / "d.html")
        assert browser.console() == []
        assert browser.script(drawn) >= 2 * 2


def test_what_had_too_few_depths_to_compare_is_in_the_notes(folder, tmp_path):
    result, page = written(folder, tmp_path / "r.html")
    [sentence] = health(result).unjudged
    assert sentence in page
