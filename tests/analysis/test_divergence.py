"""Known answers: an error put in at one place is found there, and inherited everywhere later."""

from __future__ import annotations

import math

import pytest
import torch
from tests.analysis.small_runs import (
    PlainMlp,
    capture,
    capture_plain,
    llama,
    nan_output,
    noisy_gradient,
    noisy_output,
)

from tensortap_analysis import compare

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("analysis-divergence")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Captures of one Llama; each made once."""
    folder, model = tmp_path_factory.mktemp("llama"), llama()

    def run(name, **options):
        if not (folder / name).exists():
            capture(model, folder / name, **options)
        return folder / name

    return run


def names(divergences):
    return list(dict.fromkeys(found.name for found in divergences))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("layers.1.mlp.down_proj", "layers.1.mlp.down"),
        ("layers.2.self_attn.k_proj", "layers.2.attn.k"),
        ("layers.0.input_layernorm", "layers.0.input_norm"),
        ("layers.3.mlp.up_proj", "layers.3.mlp.up"),
        ("embed_tokens", "embed"),
    ],
)
def test_an_error_of_one_module_is_local_there_and_inherited_later(runs, module, expected):
    broken = runs(module, broken=[noisy_output(f"model.{module}")])
    [run] = compare(runs("ref"), broken).runs
    assert names(run.local) == [f"{expected}/forward/output"]
    assert run.first_divergence.name == f"{expected}/forward/output"
    assert run.first_divergence.origin == "local"
    assert run.first_divergence.local == pytest.approx(0.05, rel=0.2)
    inherited = names(d for d in run.divergences if d.origin == "inherited")
    assert "layers.3/forward/output" in inherited
    assert "layers.0/backward/grad_output" in inherited
    assert all(d.inherited > 0 for d in run.divergences if d.origin == "inherited")
    earlier = [pair for pair in run.pairs if pair.order < run.first_divergence.pair.order]
    assert earlier
    assert all(pair.equal for pair in earlier)


def test_two_broken_layers_are_both_local_where_the_second_is_worse(runs):
    both = [noisy_output("model.layers.0.mlp.down_proj", 0.001),
            noisy_output("model.layers.2.mlp.down_proj", 0.5)]  # fmt: skip
    [run] = compare(runs("ref"), runs("two", broken=both)).runs
    assert names(run.local) == [f"layers.{n}.mlp.down/forward/output" for n in (0, 2)]


@pytest.mark.parametrize(
    "module", ["model.layers.2.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
)
def test_an_error_of_the_backward_pass_is_found_there(runs, module):
    name = {"down_proj": "layers.2.mlp.down", "q_proj": "layers.1.attn.q"}[module.split(".")[-1]]
    broken = runs(f"gradient-{name}", broken=[noisy_gradient(module)])
    [run] = compare(runs("ref"), broken).runs
    assert names(run.local) == [f"{name}/backward/grad_output"]
    assert all("/forward/" not in found.name for found in run.divergences)
    assert f"{name}/grad/weight" in names(run.divergences)


def test_a_nan_is_local_where_it_appears_and_its_layers_are_listed(runs):
    broken = runs("nan", broken=[nan_output("model.layers.1.self_attn.o_proj")])
    [run] = compare(runs("ref"), broken).runs
    first = run.first_divergence
    assert first.name == "layers.1.attn.out/forward/output"
    assert first.error == math.inf
    assert names(run.local) == [first.name]
    assert "NaN" in first.judgement.grade
    listed = [line for line in run.abnormal if line.startswith("layers.1.attn.out/forward/output")]
    assert listed == ["layers.1.attn.out/forward/output (step 0): RUN 2 NaN"]


def test_a_changed_weight_is_local_and_what_its_layer_returns_inherits_from_it(runs, tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0] += 0.5
    [run] = compare(runs("ref"), capture(model, tmp_path / "weight")).runs
    assert run.first_divergence.name == "layers.1.mlp.gate/param/weight"
    assert str(run.first_divergence).endswith("added here; the weights differ")
    assert names(run.local) == ["layers.1.mlp.gate/param/weight"]
    output = next(d for d in run.divergences if d.name == "layers.1.mlp.gate/forward/output")
    assert [pair.name for pair in output.inputs if pair.error > 0] == [run.first_divergence.name]


def test_bf16_is_within_the_noise_of_another_bf16_run_and_an_error_is_not(runs):
    noise = runs("bf16", dtype=torch.bfloat16)
    # Another rounding of the same thing: activations of each layer rounded at random.
    repeat = runs(
        "again", broken=[noisy_output(f"model.layers.{n}.mlp.down_proj", 1e-3) for n in range(4)]
    )
    agreed = compare(runs("ref"), repeat, noise=noise)
    assert agreed.verdict == "agree"
    assert not agreed.runs[0].estimated
    broken = runs("model.layers.1.mlp.down_proj-0.3",
                  broken=[noisy_output("model.layers.1.mlp.down_proj", 0.3)])  # fmt: skip
    found = compare(runs("ref"), broken, noise=noise)
    assert found.verdict == "differ"
    assert names(found.runs[0].local) == ["layers.1.mlp.down/forward/output"]
    backward = [d for d in found.runs[0].divergences if "/backward/" in d.name]
    assert backward  # judged against the noise of the backward pass as well


def test_bf16_against_fp32_without_a_noise_run_is_explained_by_rounding_and_says_estimate(runs):
    found = compare(runs("ref"), runs("bf16", dtype=torch.bfloat16))
    assert found.verdict == "agree"
    [run] = found.runs
    assert run.estimated
    assert all(j.estimated for j, p in zip(run.judgements, run.pairs, strict=True) if p.error > 0
               and "mask" not in j.grade)  # fmt: skip
    assert compare(runs("ref"), runs("ref")).runs[0].estimated is False


@pytest.mark.parametrize("module", ["layers.1.up", "layers.0.norm", "layers.4.act", "head"])
def test_a_plain_model_is_judged_by_its_own_names(tmp_path, module):
    model = PlainMlp()
    ref = capture_plain(model, tmp_path / "ref")
    [run] = compare(ref, capture_plain(model, tmp_path / "run", broken=[noisy_output(module)])).runs
    assert names(run.local) == [f"{module}/forward/output"]
    assert run.first_divergence.name == f"{module}/forward/output"


def test_layer_outputs_alone_tell_inherited_from_local(tmp_path):
    model = PlainMlp()
    only = {"select": "layers.*/forward/output,!layers.*.*/forward/output"}
    ref = capture_plain(model, tmp_path / "ref", **only)
    broken = [noisy_output("layers.2.down", 0.3)]
    [run] = compare(ref, capture_plain(model, tmp_path / "run", broken=broken, **only)).runs
    assert [pair.name for pair in run.pairs] == [f"layers.{n}/forward/output" for n in range(5)]
    assert [d.origin for d in run.divergences] == ["local", "inherited", "inherited"]
    assert run.first_divergence.name == "layers.2/forward/output"


def test_later_steps_inherit_what_the_first_one_broke(tmp_path, runs):
    model = llama()
    ref = capture(model, tmp_path / "ref", steps=2)
    broken = capture(model, tmp_path / "run", steps=2,
                     broken=[noisy_gradient("model.layers.2.mlp.down_proj")])  # fmt: skip
    [run] = compare(ref, broken, select="layers.*").runs
    first = [d.name for d in run.local if d.pair.at.step == 0]
    assert first == ["layers.2.mlp.down/backward/grad_output"]
    # No optimizer: the second step repeats the error, at the same place and nowhere else.
    assert [d.name for d in run.local if d.pair.at.step == 1] == first


def test_activations_without_weights_inherit_from_the_step_before(tmp_path):
    model = llama()
    only = {"steps": 2, "phases": ("forward",), "select": "layers.*/forward/output"}
    ref = capture(model, tmp_path / "ref", **only)
    broken = capture(
        model, tmp_path / "run", **only, broken=[noisy_output("model.layers.1.mlp.down_proj")]
    )
    [run] = compare(ref, broken).runs
    assert {d.pair.at.step for d in run.divergences} == {0, 1}
    assert [d.pair.at.step for d in run.local] == [0]
