"""`compare`: what it measures, how presets judge it, what it warns of, and what is kept of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture_plain, noisy_output
from tests.core.store.building import info, record, small_run, write_run

import tensortap
from tensortap.errors import ConfigError, RunError, SelectionError
from tensortap.layouts import layout
from tensortap_analysis import Comparison, compare
from tensortap_analysis.metrics import bhattacharyya, measure_tensors

LAYER = "layers.{}/forward/output"


def run_of(path, tensors, **fields):
    run = info(**fields)
    items = [(record(n, t, seq), t) for seq, (n, t) in enumerate(tensors.items())]
    return write_run(path, items, run)


def two(tmp_path, x, y, name="embed/forward/output"):
    return run_of(tmp_path / "x", {name: x}), run_of(tmp_path / "y", {name: y})


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """Runs of one plain model: the reference, one with an error, and one of half the precision."""
    folder, model = tmp_path_factory.mktemp("mlp"), PlainMlp()
    capture_plain(model, folder / "ref", metadata={"mode": "fp32"})
    capture_plain(model, folder / "bad", broken=[noisy_output("layers.2.up")])
    capture_plain(model, folder / "close", broken=[noisy_output("layers.2.up", 1e-7)])
    return folder


@pytest.mark.parametrize("block", [7, 1 << 22])
def test_metrics_of_every_pair_are_those_of_the_tensors(mlp, block):
    [run] = compare(mlp / "ref", mlp / "bad", block=block).runs
    ref, bad = tensortap.open_run(mlp / "ref"), tensortap.open_run(mlp / "bad")
    assert len(run.pairs) == len(ref.names()) > 50
    for pair in run.pairs:
        a, b = ref.tensor(pair.name), bad.tensor(pair.name)
        exact = measure_tensors(a, b)
        if block > a.numel():
            assert pair.metrics == exact
        assert pair.metrics.percentiles == exact.percentiles
        d = b.double().numpy() - a.double().numpy()
        np.testing.assert_allclose(pair.metrics.mse, (d**2).mean(), rtol=1e-12)
        np.testing.assert_allclose(pair.metrics.max_abs, np.abs(d).max(), rtol=1e-12)
        assert pair.metrics.max_abs_at == exact.max_abs_at


def test_pairs_come_in_execution_order_of_the_reference(mlp):
    [run] = compare(mlp / "ref", mlp / "bad").runs
    expected = [str(record.name) for record in tensortap.open_run(mlp / "ref").records()]
    assert [pair.name for pair in run.pairs] == expected


def test_select_and_step_narrow_what_is_compared(mlp, tmp_path):
    [run] = compare(mlp / "ref", mlp / "bad", select="layers.1.up/forward/*").runs
    assert [pair.name for pair in run.pairs] == [
        f"layers.1.up/forward/{w}" for w in ("input", "output")
    ]
    small_run(tmp_path / "a")
    small_run(tmp_path / "b")
    [run] = compare(tmp_path / "a", tmp_path / "b", step=1).runs
    assert {pair.at.step for pair in run.pairs} == {1}


def test_open_runs_and_folders_of_a_layout_are_taken_as_they_are(mlp, tmp_path):
    with tensortap.open_run(mlp / "ref") as run:
        layout("pt").export(run, tmp_path / "folder", "layers.*", lambda done: None)
        found = compare(run, tmp_path / "folder")
    assert found.verdict == "agree"
    assert found.runs[0].run.path == str(tmp_path / "folder")
    assert all(pair.equal for pair in found.runs[0].pairs)


def test_what_cannot_be_opened_or_asked_is_one_sentence(mlp, tmp_path):
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "notes.txt").write_text("nothing")
    with pytest.raises(RunError, match="no run at"):
        compare(mlp / "ref", tmp_path / "missing")
    with pytest.raises(RunError, match="neither a run nor in a layout"):
        compare(mlp / "ref", tmp_path / "junk")
    with pytest.raises(ConfigError, match="no preset 'clasic'"):
        compare(mlp / "ref", mlp / "bad", preset="clasic")
    with pytest.raises(ConfigError, match="no threshold 'mse'"):
        compare(mlp / "ref", mlp / "bad", thresholds={"mse": 1.0})
    with pytest.raises(ConfigError, match="above 0"):
        compare(mlp / "ref", mlp / "bad", thresholds={"ratio": -1.0})
    with pytest.raises(ConfigError, match="at least one run"):
        compare(mlp / "ref")
    with pytest.raises(SelectionError):
        compare(mlp / "ref", mlp / "bad", select="nothing.like.this")


@pytest.mark.parametrize(
    ("size", "words", "verdict"),
    [
        (3e-3, "very close, near perfect", "agree"),
        (2e-2, "good, excellent", "agree"),
        (8e-2, "fair, good", "agree"),
        (0.2, "large, look at it", "differ"),
    ],
)
def test_classic_grades_in_the_words_of_the_older_tools(tmp_path, size, words, verdict):
    x = torch.randn(20_000, dtype=torch.float64)
    ref, run = two(tmp_path, x, x + size * torch.randn(20_000, dtype=torch.float64))
    found = compare(ref, run, preset="classic")
    assert found.runs[0].judgements[0].grade == words
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("offset", "grade"),
    [(5e-4, "good"), (2e-3, "mean abs 2x its limit"), (0.0, "max abs 5x its limit")],
)
def test_port_judges_by_the_fixed_thresholds(tmp_path, offset, grade):
    x = torch.randn(1000, dtype=torch.float64)
    y = x + offset
    if not offset:
        y[3] += 0.05
    ref, run = two(tmp_path, x, y)
    judgement = compare(ref, run, preset="port").runs[0].judgements[0]
    assert judgement.grade == grade
    assert judgement.within == (grade == "good")


def test_noise_judges_by_the_ratio_of_errors(tmp_path):
    x, d = torch.randn(50_000, dtype=torch.float64), torch.randn(50_000, dtype=torch.float64)
    ref = run_of(tmp_path / "ref", {LAYER.format(0): x})
    noise = run_of(tmp_path / "noise", {LAYER.format(0): x + 1e-2 * d.flip(0)})
    for scale, within in ((0.1, True), (1.0, True), (1.6, False)):
        run = run_of(tmp_path / f"run{scale}", {LAYER.format(0): x + scale * 1e-2 * d})
        found = compare(ref, run, noise=noise)
        [judgement] = found.runs[0].judgements
        assert judgement.within is within
        assert judgement.grade.startswith(f"{scale:g}x the noise")
        assert not judgement.estimated
        assert found.runs[0].pairs[0].noise.metrics == measure_tensors(x, x + 1e-2 * d.flip(0))


def test_errors_of_the_size_of_noise_but_spread_otherwise_are_found(tmp_path):
    x, d = torch.randn(50_000, dtype=torch.float64), torch.randn(50_000, dtype=torch.float64)
    lumps = torch.zeros_like(x)
    lumps[::100] = 10 * d[::100] / d[::100].square().mean().sqrt() * 1.05
    ref = run_of(tmp_path / "ref", {LAYER.format(0): x})
    noise = run_of(tmp_path / "noise", {LAYER.format(0): x + 1e-2 * d})
    run = run_of(tmp_path / "run", {LAYER.format(0): x + 1e-2 * lumps})
    found = compare(ref, run, noise=noise)
    [pair], [judgement] = found.runs[0].pairs, found.runs[0].judgements
    assert pair.rmse < 1.5 * pair.noise.rmse
    assert bhattacharyya(pair.metrics, pair.noise.metrics) < 0.99
    assert "Bhattacharyya" in judgement.grade
    assert found.verdict == "differ"
    assert found.judge(bhattacharyya=0.01).verdict == "agree"


def test_few_values_are_not_blamed_for_the_shape_of_their_errors(tmp_path):
    verdicts = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, d, e = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(3))
        folder = tmp_path / str(seed)
        ref, run = two(folder, x, x + 1e-2 * d)
        noise = run_of(folder / "noise", {"embed/forward/output": x + 1e-2 * e})
        verdicts.append(compare(ref, run, noise=noise).verdict)
    assert verdicts.count("agree") >= 18


def test_integers_that_differ_are_never_explained_by_rounding(tmp_path):
    ids = torch.arange(10)
    changed = ids.clone()
    changed[3] += 1
    ref, run = two(tmp_path, ids, changed, "embed/forward/input")
    found = compare(ref, run)
    assert found.verdict == "differ"
    assert found.first_divergence.judgement.excess == math.inf


def test_masks_of_two_dtypes_are_not_a_difference(tmp_path):
    later = torch.ones(4, 4).triu(1)
    masks = [later.to(d) * torch.finfo(d).min for d in (torch.float32, torch.bfloat16)]
    ref, run = two(tmp_path, *masks, "layers.0/forward/input.attention_mask")
    for preset in ("noise", "classic", "port"):
        assert compare(ref, run, preset=preset).verdict == "agree"
    moved = run_of(
        tmp_path / "moved", {"layers.0/forward/input.attention_mask": masks[1].T.clone()}
    )
    assert compare(ref, moved, preset="port").verdict == "differ"


def test_nan_on_both_sides_agrees_and_on_one_side_differs_in_every_preset(tmp_path):
    x = torch.randn(5)
    x[2] = torch.nan
    ref, run = two(tmp_path, x, torch.nan_to_num(x))
    for preset in ("noise", "classic", "port"):
        assert compare(ref, ref, preset=preset).verdict == "agree"
        found = compare(ref, run, preset=preset)
        assert found.verdict == "differ"
        assert found.first_divergence.error == math.inf


def test_equal_runs_that_claim_different_modes_are_warned_of_by_name(tmp_path):
    x = {"embed/forward/output": torch.randn(4)}
    fp32, int8 = (run_of(tmp_path / mode, x, mode=mode) for mode in ("fp32", "w8a8"))
    [run] = compare(fp32, int8).runs
    assert run.verdict == "agree"
    warning = run.warnings[0]
    assert str(fp32) in warning
    assert str(int8) in warning
    assert "mode fp32" in warning
    assert "mode w8a8" in warning
    assert "bitwise equal" in warning
    assert not any("equal" in text for text in compare(fp32, fp32).runs[0].warnings)
    by_hand = run_of(tmp_path / "hand", x, metadata={"format": "mxfp4"})
    assert "format mxfp4" in compare(fp32, by_hand).runs[0].warnings[0]


def test_runs_with_nothing_in_common_are_warned_of_and_incomparable(tmp_path):
    a = run_of(tmp_path / "a", {"embed/forward/output": torch.randn(4)}, model_class="Llama")
    b = run_of(tmp_path / "b", {"head/forward/output": torch.randn(4)}, model_class="Mamba")
    found = compare(a, b)
    assert found.verdict == "incomparable"
    assert "nothing in common" in found.runs[0].warnings[0]
    assert "The models differ: Llama and Mamba." in found.runs[0].warnings
    assert len(found.runs[0].unpaired) == 2


def test_versions_and_an_incomplete_run_are_said(tmp_path):
    x = {"embed/forward/output": torch.randn(4), "lm_head/forward/output": torch.randn(4)}
    a = run_of(tmp_path / "a", x, versions={"torch": "2.4.0"})
    b = run_of(tmp_path / "b", x, versions={"torch": "2.13.0"})
    lines = b / "rank00000" / "records.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    (b / "rank00000" / "index.bin").unlink()
    [run] = compare(a, b).runs
    assert "Versions differ: torch 2.4.0 and 2.13.0." in run.warnings
    assert any(text.startswith("RUN is incomplete: ") for text in run.warnings)
    assert [pair.name for pair in run.pairs] == ["embed/forward/output"]


def test_a_noise_run_that_says_nothing_is_warned_of(tmp_path):
    x = torch.randn(100)
    ref, run = two(tmp_path, x, x + 1e-3)
    [compared] = compare(ref, run, noise=ref).runs
    assert any("says nothing about noise" in text for text in compared.warnings)
    assert compared.verdict == "differ"
    other = run_of(tmp_path / "other", {"head/forward/output": x})
    [compared] = compare(ref, run, noise=other).runs
    assert any("has none of the tensors" in text for text in compared.warnings)
    assert compared.estimated


def test_jumps_between_layers_and_abnormal_magnitudes_are_listed(tmp_path):
    tensors = {LAYER.format(n): torch.randn(2, 8, dtype=torch.float64) for n in range(4)}
    ref = run_of(tmp_path / "ref", tensors)
    jumped = {**tensors, LAYER.format(2): tensors[LAYER.format(2)] + 20}
    [run] = compare(ref, run_of(tmp_path / "run", jumped)).runs
    assert [change.at.name for change in run.changes] == [LAYER.format(n) for n in (1, 2, 3)]
    assert [change.at.name for change in run.jumps] == [LAYER.format(2), LAYER.format(3)]
    step = (jumped[LAYER.format(2)] - jumped[LAYER.format(1)]).abs()
    assert run.jumps[0].other_max == step.max().item()
    assert run.jumps[0].other_mean == pytest.approx(step.mean().item())
    assert run.jumps[0].ref_max == (tensors[LAYER.format(2)] - tensors[LAYER.format(1)]).abs().max()
    mean = jumped[LAYER.format(2)].mean().item()
    assert run.abnormal == (f"layers.2/forward/output (step 0): RUN mean {mean:.4g}",)


def test_a_saved_comparison_is_judged_again_without_the_runs(mlp, tmp_path):
    for name in ("ref", "bad", "close"):
        shutil.copytree(mlp / name, tmp_path / name)
    found = compare(tmp_path / "ref", tmp_path / "bad", noise=tmp_path / "close")
    found.save(tmp_path / "saved.json")
    for name in ("ref", "bad", "close"):
        shutil.rmtree(tmp_path / name)
    loaded = Comparison.load(tmp_path / "saved.json")
    assert loaded == found
    assert loaded.first_divergence == found.first_divergence
    for preset in ("classic", "port", "noise"):
        assert loaded.judge(preset) == found.judge(preset)
    assert loaded.judge("noise", ratio=1e12, bhattacharyya=1e-12).verdict == "agree"
    assert loaded.judge("port", max_abs=99.0, mean_abs=99.0, cosine=0.1).verdict == "agree"
    loaded.judge("port", max_abs=99.0).save(tmp_path / "again.json")
    assert Comparison.load(tmp_path / "again.json").thresholds == {"max_abs": 99.0}


def test_thresholds_that_were_replaced_stay_so_as_long_as_the_preset_stays(mlp, tmp_path):
    found = compare(mlp / "ref", mlp / "bad", thresholds={"bhattacharyya": 0.9})
    found.save(tmp_path / "saved.json")
    loaded = Comparison.load(tmp_path / "saved.json")
    assert loaded.judge(ratio=2).thresholds == {"bhattacharyya": 0.9, "ratio": 2}
    assert loaded.judge("noise", ratio=2).thresholds == {"bhattacharyya": 0.9, "ratio": 2}
    assert loaded.judge("classic").thresholds == {}


def test_a_narrowed_comparison_is_that_of_the_narrowed_runs(mlp):
    whole, select = compare(mlp / "ref", mlp / "bad"), "layers.1.*,head/forward/*"
    asked = compare(mlp / "ref", mlp / "bad", select=select)
    narrowed = whole.narrowed(select, step=0)
    ours, theirs = ([(p.at, p.metrics) for p in found.runs[0].pairs] for found in (narrowed, asked))
    assert ours == theirs
    assert narrowed.runs[0].judgements == asked.runs[0].judgements
    with pytest.raises(SelectionError, match="matches nothing in the comparison"):
        whole.narrowed("nope")
    with pytest.raises(ConfigError, match="Nothing was compared at step 4, only at step 0"):
        whole.narrowed(step=4)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "tensortap-comparison", "schema": 9}'])
def test_a_file_that_is_no_comparison_is_refused(tmp_path, text):
    (tmp_path / "saved.json").write_text(text)
    with pytest.raises(RunError, match="no saved comparison"):
        Comparison.load(tmp_path / "saved.json")
    with pytest.raises(RunError, match="no saved comparison at"):
        Comparison.load(tmp_path / "missing.json")


def test_saved_infinities_and_statistics_come_back(tmp_path):
    x = torch.randn(5)
    y = x.clone()
    y[0] = torch.inf
    ref, run = two(tmp_path, x, y)
    found = compare(ref, run)
    found.save(tmp_path / "saved.json")
    assert "Infinity" not in (tmp_path / "saved.json").read_text()
    assert Comparison.load(tmp_path / "saved.json") == found


def test_several_runs_make_one_table_and_the_worst_verdict(mlp):
    found = compare(mlp / "ref", mlp / "close", mlp / "bad", preset="port")
    assert [run.verdict for run in found.runs] == ["agree", "differ"]
    assert found.verdict == "differ"
    assert found.first_divergence == found.runs[1].first_divergence
    text = found.table()
    assert [line.split()[-1] for line in text.splitlines()[2:]] == ["agree", "differ"]
    rows = found.table("csv").splitlines()
    assert len(rows) == 3
    first = next(p for p in found.runs[1].pairs if p.name == LAYER.format(0))
    last = next(p for p in found.runs[1].pairs if p.name == LAYER.format(4))
    cells = dict(zip(rows[0].split(","), rows[2].split(","), strict=True))
    assert float(cells["first_mse"]) == first.metrics.mse
    assert float(cells["last_mae"]) == last.metrics.mae
    correlations = [p.metrics.correlation for p in found.runs[1].pairs]
    known = [c for c in correlations if c is not None]
    assert float(cells["mean_correlation"]) == pytest.approx(sum(known) / len(known))
    assert cells["worst"] == found.runs[1].worst.name
    assert found.table("markdown").count("\n") == 3
    with pytest.raises(ConfigError, match="no table 'html'"):
        found.table("html")


def test_progress_counts_every_tensor_of_every_run(mlp):
    seen = []
    found = compare(mlp / "ref", mlp / "bad", mlp / "close", progress=lambda *at: seen.append(at))
    total = sum(len(run.pairs) for run in found.runs)
    assert seen == [(n, total) for n in range(1, total + 1)]


def test_comparisons_are_frozen_data(mlp):
    found = compare(mlp / "ref", mlp / "bad")
    assert replace(found) == found
    assert json.loads(json.dumps(found.to_json()))["schema"] == 1
    with pytest.raises(AttributeError):
        found.preset = "port"
