"""Runs that were captured, or are compared, only in part: nothing unseen is said to be equal."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture, capture_plain, llama, noisy_output

from tensortap_analysis import compare
from tensortap_analysis.comparison import tracing
from tensortap_analysis.comparison.result import Comparison

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("analysis-divergence")

ENDS = "layers.0/forward/output,layers.3/forward/output"
BROKEN = [noisy_output("model.layers.1.mlp.up_proj", 0.3)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Captures of one Llama; each made once."""
    folder, model = tmp_path_factory.mktemp("partial"), llama()

    def run(name, **options):
        if not (folder / name).exists():
            capture(model, folder / name, **options)
        return folder / name

    return run


@pytest.fixture(scope="module")
def both(runs):
    return runs("ref"), runs("bad", broken=BROKEN)


def origins(run):
    return {found.name: found.origin for found in run.divergences}


@pytest.mark.parametrize(
    ("select", "first", "given"),
    [
        (ENDS, "layers.3/forward/output", "layers.3/forward/input"),
        ("layers.2.*", "layers.2/forward/input", "layers.1/forward/output"),
        ("lm_head/*", "lm_head/forward/input", "final_norm/forward/output"),
        (
            "layers.2.attn.q/forward/*",
            "layers.2.attn.q/forward/input",
            "layers.2.attn/forward/input",
        ),
    ],
)
def test_a_selection_does_not_make_an_inherited_error_local(both, select, first, given):
    [run] = compare(*both, select=select).runs
    assert run.first_divergence.name == first
    assert not run.local
    assert given in {pair.name for pair in run.first_divergence.inputs if pair.error > 0}
    assert "; inherited: " in str(run.first_divergence)


@pytest.mark.parametrize(
    "select",
    [ENDS, "layers.2.*", "layers.1.mlp.*", "layers.1.attn.*", "*/grad/weight", "*/forward/output",
     "*.mlp.up/forward/output", "*/backward/grad_output"],
)  # fmt: skip
def test_origins_are_those_of_the_whole_runs_whatever_is_selected(both, select):
    [every] = compare(*both).runs
    [run] = compare(*both, select=select).runs
    known = origins(every)
    assert origins(run)
    assert origins(run) == {name: known[name] for name in origins(run)}


def test_what_was_looked_for_besides_is_not_listed_or_judged(both):
    [run] = compare(*both, select=ENDS).runs
    assert [pair.name for pair in run.pairs] == ENDS.split(",")
    assert len(run.judgements) == 2
    assert run.not_compared == 0
    assert {row.layer for row in run.depth} <= {"layers.0", "layers.3"}


def test_a_run_that_lacks_the_inputs_says_which_are_missing(runs):
    pair = runs("ref-ends", select=ENDS), runs("bad-ends", select=ENDS, broken=BROKEN)
    [run] = compare(*pair).runs
    assert origins(run) == {"layers.3/forward/output": "unknown"}
    assert run.first_divergence.missing == ("layers.3/forward/input",)
    assert (
        "; layers.3/forward/input would tell, and was not compared: capture it in both runs"
        in str(run.first_divergence)
    )
    [row] = [row for row in run.depth if row.layer == "layers.3"]
    assert (row.input, row.added) == (None, None)


@pytest.mark.parametrize(
    ("select", "first", "missing"),
    [
        ("layers.2.*", "layers.2/forward/input", "layers.1/forward/output"),
        ("layers.2.mlp.*", "layers.2.mlp/forward/input", "layers.2.*/forward/output"),
        ("layers.1.attn.*", "layers.1.attn.out/backward/grad_output",
         "layers.1.attn/backward/grad_output"),
        ("*.down/grad/weight", "layers.3.mlp.down/grad/weight",
         "layers.3.mlp.down/backward/grad_output"),
    ],
)  # fmt: skip
def test_nothing_is_local_whose_origin_was_not_captured(runs, select, first, missing):
    word = "".join(letter for letter in select if letter.isalnum())
    pair = (runs(f"ref-{word}", select=select), runs(f"bad-{word}", select=select, broken=BROKEN))
    [run] = compare(*pair).runs
    assert not run.local
    assert run.unknown[0].name == first
    assert missing in run.unknown[0].missing


def test_outputs_of_all_modules_are_enough(runs):
    only = {"select": "*/forward/output"}
    pair = runs("ref-out", **only), runs("bad-out", **only, broken=BROKEN)
    [run] = compare(*pair).runs
    assert [found.name for found in run.local] == ["layers.1.mlp.up/forward/output"]


def test_a_saved_comparison_that_is_narrowed_keeps_what_it_knows(both, tmp_path):
    found = compare(*both)
    found.save(tmp_path / "all.json")
    [every] = found.runs
    [run] = Comparison.load(tmp_path / "all.json").narrowed(ENDS).runs
    assert origins(run) == {"layers.3/forward/output": "inherited"}
    assert (
        run.first_divergence.inputs
        == next(one for one in every.divergences if one.name == "layers.3/forward/output").inputs
    )
    compare(*both, select="layers.2.*").save(tmp_path / "some.json")
    [again] = Comparison.load(tmp_path / "some.json").judge(ratio=2).runs
    assert not again.local


def test_a_weight_that_differs_at_a_later_step_may_have_differed_before(runs):
    def wrong(model):
        with torch.no_grad():
            model.lm_head.weight[0] += 0.5
        return noisy_output("model.norm", 0)(model)

    pair = runs("ref-2", steps=2), runs("bad-2", steps=2, broken=[wrong])
    first = compare(*pair).runs[0].first_divergence
    assert (first.name, first.origin) == ("lm_head/param/weight", "local")
    later = compare(*pair, step=1).runs[0].first_divergence
    assert (later.name, later.origin) == ("lm_head/param/weight", "unknown")


def test_layers_are_known_by_the_one_before_them(tmp_path):
    model, only = PlainMlp(), "layers.1/forward/output,layers.2/forward/output"
    ref = capture_plain(model, tmp_path / "ref", select=only)
    broken = [noisy_output("layers.2.down", 0.3)]
    [run] = compare(ref, capture_plain(model, tmp_path / "run", select=only, broken=broken)).runs
    assert origins(run) == {"layers.2/forward/output": "local"}
    [row] = [row for row in run.depth if row.layer == "layers.2"]
    assert row.added == pytest.approx(run.first_divergence.error)


def test_what_was_not_looked_for_is_unknown_and_never_local(both, monkeypatch):
    monkeypatch.setattr(tracing, "_MOST", 0)
    [run] = compare(*both, select="layers.3/forward/output").runs
    assert origins(run) == {"layers.3/forward/output": "unknown"}


def test_of_many_steps_only_the_first_that_differ_are_looked_through(runs, monkeypatch):
    monkeypatch.setattr(tracing, "_STEPS", 1)
    pair = runs("ref-3", steps=3), runs("bad-3", steps=3, broken=BROKEN)
    [run] = compare(*pair, select="layers.2/forward/output").runs
    assert [found.pair.at.step for found in run.divergences] == [0, 1, 2]
    assert {pair.at.step for pair in run.beside} == {0}
    assert not run.local


@pytest.mark.parametrize(
    ("select", "broken"),
    [
        ("!*.up/*", "layers.1.mlp.up_proj"),
        ("!layers.1.mlp.*", "layers.1.mlp.up_proj"),
        ("*/forward/output", "layers.1.self_attn"),
        ("!*/forward/context,!*.out/forward/input", "layers.1.self_attn"),
    ],
)
def test_a_module_that_was_left_out_of_the_capture_makes_no_other_one_local(runs, select, broken):
    word = "".join(letter for letter in select if letter.isalnum())
    bad = [_other_values] if broken.endswith("attn") else [noisy_output(f"model.{broken}", 0.3)]
    name = f"{word}-{broken.split('.')[-1]}"
    pair = runs(f"ref-{name}", select=select), runs(f"bad-{name}", select=select, broken=bad)
    [run] = compare(*pair).runs
    assert run.divergences
    assert not [found.name for found in run.local if ".down" in found.name or ".out/" in found.name]


@contextmanager
def _other_values(model):
    """What attention makes of its values is wrong in one layer, between the modules."""
    attention = model.model.layers[1].self_attn
    attention.scaling *= 3
    yield
