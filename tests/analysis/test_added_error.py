"""Known answers: how much error each module adds, however much it inherits."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture, capture_plain, llama, noisy_output
from tests.core.store.building import record, write_run
from torch import nn

import tensortap
from tensortap.formats import get
from tensortap_analysis import Comparison, compare
from tensortap_analysis.divergence import products

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("analysis-added-error")


def mxfp4(*modules):
    """Input and weight of these linears are rounded to mxfp4 where they are used."""

    def break_it(model):
        codec = get("mxfp4")

        def rounded(linear, args, output):
            operands = (codec.fake_quantize(t, axis=-1) for t in (args[0], linear.weight))
            return nn.functional.linear(*operands, linear.bias)

        hooks = [model.get_submodule(name).register_forward_hook(rounded) for name in modules]

        @contextlib.contextmanager
        def hooked():
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

        return hooked()

    return break_it


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """Runs of one Llama; each made once."""
    folder, model = tmp_path_factory.mktemp("llama"), llama()

    def run(name, **options):
        if not (folder / name).exists():
            capture(model, folder / name, **options)
        return folder / name

    return run


def linears(model, *, but=()):
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "head" and not name.startswith(tuple(but))
    ]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Runs of a deep plain model: all linears in mxfp4, and all but those of one layer."""
    folder, model = tmp_path_factory.mktemp("deep"), PlainMlp(depth=12, width=64)
    forward = {"phases": ("forward", "param")}
    capture_wide(model, folder / "ref", **forward)
    capture_wide(model, folder / "all", broken=[mxfp4(*linears(model))], **forward)
    kept = mxfp4(*linears(model, but=["layers.7."]))
    capture_wide(model, folder / "kept", broken=[kept], **forward)
    return folder


def capture_wide(model, path, *, broken=(), **options):
    """A forward pass of a plain model on many rows."""
    model = copy.deepcopy(model)
    width = model.head.in_features
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(3))
    with contextlib.ExitStack() as stack:
        for break_it in broken:
            stack.enter_context(break_it(model))
        with tensortap.attach(model, path, values="full", on_error="raise", **options):
            model(x)
    return path


def test_where_every_layer_is_quantised_every_layer_adds_about_the_same(deep):
    [run] = compare(deep / "ref", deep / "all").runs
    added = [row.added for row in run.depth]
    assert [row.layer for row in run.depth] == [f"layers.{n}" for n in range(12)]
    assert all(row.measured for row in run.depth)
    assert max(added) < 1.3 * min(added)
    assert added[0] == pytest.approx(0.2, rel=0.25)  # two linears of about 0.14 each
    assert [row.input for row in run.depth[1:]] == [row.output for row in run.depth[:-1]]
    expected = {f"layers.{n}.{m}/forward/output" for n in range(12) for m in ("up", "down")}
    assert {found.name for found in run.local} == expected
    assert {found.name for found in run.suspects} == expected


def test_a_layer_that_was_kept_adds_nothing_among_those_that_do(deep):
    [run] = compare(deep / "ref", deep / "kept").runs
    added = {row.layer: row for row in run.depth}
    kept = added.pop("layers.7")
    assert kept.output > 0.1
    assert kept.added < 1e-5
    assert min(row.added for row in added.values()) > 0.1
    assert all(row.by in (f"{row.layer}.up", f"{row.layer}.down") for row in added.values())
    assert not [found.name for found in run.local if found.name.startswith("layers.7")]
    again = Comparison.from_json(compare(deep / "ref", deep / "kept").to_json())
    assert again.runs[0].depth == run.depth


def test_the_added_error_of_a_product_is_that_of_the_rounded_operands(deep):
    """In float64: W x of the run's own x, with and without rounding."""
    [run] = compare(deep / "ref", deep / "all").runs
    codec = get("mxfp4")
    ref, other = tensortap.open_run(deep / "ref"), tensortap.open_run(deep / "all")
    for name in ("layers.3.up", "layers.11.down"):
        x, w = (other.tensor(f"{name}/{what}") for what in ("forward/input", "param/weight"))
        exact = x.double() @ w.double().T
        rounded = (
            codec.fake_quantize(x, axis=-1).double() @ codec.fake_quantize(w, axis=-1).double().T
        )
        size = ref.tensor(f"{name}/forward/output").double().norm()
        [found] = [one for one in run.divergences if one.name == f"{name}/forward/output"]
        assert found.basis == "measured"
        assert found.local == pytest.approx(((rounded - exact).norm() / size).item(), rel=1e-4)
        inherited = ref.tensor(f"{name}/forward/input").double() @ w.double().T
        assert found.inherited == pytest.approx(
            ((exact - inherited).norm() / size).item(), rel=1e-4
        )


@pytest.mark.parametrize(
    ("second", "noisy"), [(0.02, False), (0.05, False), (0.05, True), (0.1, True)]
)
def test_two_faulty_layers_are_both_named_whatever_their_sizes(llamas, second, noisy):
    faults = [("model.layers.0.mlp.down_proj", 0.05), ("model.layers.2.mlp.down_proj", second)]
    run = llamas(f"two-{second}", broken=[noisy_output(*fault) for fault in faults])
    noise = llamas("bf16", dtype=torch.bfloat16) if noisy else None
    [found] = compare(llamas("ref"), run, noise=noise).runs
    local = {one.name: one for one in found.local}
    assert list(local) == [f"layers.{n}.mlp.down/forward/output" for n in (0, 2)]
    assert local["layers.0.mlp.down/forward/output"].local == pytest.approx(0.05, rel=0.15)
    assert local["layers.2.mlp.down/forward/output"].local == pytest.approx(second, rel=0.15)
    assert found.first_divergence.name == "layers.0.mlp.down/forward/output"


def test_of_large_products_rows_and_columns_are_drawn_and_tell_the_same(deep, monkeypatch):
    whole, some = {}, {}
    for found in (whole, some):
        [run] = compare(deep / "ref", deep / "all").runs
        found |= {pair.name: pair.passed for pair in run.pairs if pair.passed is not None}
        monkeypatch.setattr(products, "_WORK", 16 * 32 * 64)
        monkeypatch.setattr(products, "_ELEMENTS", 32 * 64)
    assert len(whole) == 24  # all but the first, whose input is equal; the head as well
    assert len(some) > 18  # where what was drawn does not stand for all, nothing is said
    for name, passed in some.items():
        assert passed != whole[name]
        assert passed.local == pytest.approx(whole[name].local, rel=0.25, abs=1e-6)
        assert passed.inherited == pytest.approx(whole[name].inherited, rel=0.25)


def test_without_weights_a_clear_addition_is_a_suspect_and_marked_as_an_estimate(tmp_path):
    model = PlainMlp(depth=6, width=32)
    forward = {"phases": ("forward",)}
    ref = capture_wide(model, tmp_path / "ref", **forward)
    faults = [noisy_output("layers.1.down", 0.5), noisy_output("layers.4.down", 0.2)]
    run = capture_wide(model, tmp_path / "run", broken=faults, **forward)
    [found] = compare(ref, run).runs
    assert [one.name for one in found.local] == ["layers.1.down/forward/output"]
    second = next(one for one in found.suspects if one.name == "layers.4.down/forward/output")
    assert second.basis == "expected"
    assert second.origin == "inherited"
    assert second.local == pytest.approx(0.2, rel=0.2)
    assert not next(row for row in found.depth if row.layer == "layers.4").measured


def test_a_weight_is_an_input_of_what_is_made_with_it(tmp_path):
    model = PlainMlp()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.layers[2].up.weight *= 1 + 0.1 * torch.randn_like(changed.layers[2].up.weight)
    ref, run = capture_plain(model, tmp_path / "ref"), capture_plain(changed, tmp_path / "run")
    [found] = compare(ref, run).runs
    assert [one.name for one in found.local] == ["layers.2.up/param/weight"]
    output = next(one for one in found.divergences if one.name == "layers.2.up/forward/output")
    assert "its inputs: layers.2.up/param/weight 0." in str(output)
    [row] = [row for row in found.depth if row.layer == "layers.2"]
    assert row.by == "layers.2.up"
    assert row.most == pytest.approx(0.1, rel=0.2)


def test_a_weight_that_was_recorded_after_its_product_comes_before_it(tmp_path):
    def run_of(path, weight):
        x = torch.eye(8)
        rows = [
            ("layers.0.mlp.up/forward/input", x),
            ("layers.0.mlp.up/forward/output", x @ weight.T),
            ("layers.0.mlp.up/forward/weight", weight),
        ]
        return write_run(path, [(record(n, t, seq), t) for seq, (n, t) in enumerate(rows)])

    weight = torch.randn(8, 8)
    ref, run = run_of(tmp_path / "ref", weight), run_of(tmp_path / "run", weight * 1.1)
    [found] = compare(ref, run).runs
    assert found.first_divergence.name == "layers.0.mlp.up/forward/weight"
    assert [one.name for one in found.local] == ["layers.0.mlp.up/forward/weight"]


def test_what_was_not_captured_is_not_said_to_be_equal(llamas):
    only = {"select": "layers.*/forward/output,*/grad/weight"}
    broken = {"broken": [noisy_output("model.layers.0.input_layernorm")]}
    [run] = compare(llamas("part", **only), llamas("part-norm", **only, **broken)).runs
    first = run.first_divergence
    assert first.name == "layers.0.input_norm/forward/output"
    assert first.origin == "unknown"
    assert first.missing == ("layers.0.input_norm/forward/input",)
    assert "; layers.0.input_norm/forward/input would tell, and was not compared" in str(first)
    [run] = compare(llamas("ref"), llamas("norm", **broken)).runs
    assert run.first_divergence.origin == "local"
    assert not run.first_divergence.missing
    assert str(run.first_divergence).endswith("; nothing it was computed from differs")


def test_recomputed_forwards_inherit_from_the_plain_ones(tmp_path):
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ref = capture(model, tmp_path / "ref")
    broken = [noisy_output("model.layers.1.mlp.down_proj", 0.3)]
    [run] = compare(ref, capture(model, tmp_path / "run", broken=broken)).runs
    assert any(pair.at.recompute for pair in run.pairs)
    assert {one.name for one in run.local} == {"layers.1.mlp.down/forward/output"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("layers.1.mlp.down_proj", "layers.1.mlp.down"),
        ("layers.2.self_attn.k_proj", "layers.2.attn.k"),
    ],
)
def test_by_statistics_nothing_is_local_but_what_has_equal_inputs(llamas, module, name):
    broken = [noisy_output(f"model.{module}", 0.3)]
    broken_run = llamas(f"stats-{name}", values="stats", broken=broken)
    [run] = compare(llamas("stats", values="stats"), broken_run).runs
    assert {one.name for one in run.local} == {f"{name}/forward/output"}
    later = next(one for one in run.divergences if one.basis == "statistics")
    assert "statistics do not tell" in str(later)
    assert all(row.added is None for row in run.depth[3:])
    assert math.isfinite(run.first_divergence.local)


def test_norms_attention_and_positions_that_are_wrong_are_found_where_they_are(llamas, tmp_path):
    model = llama()

    def changed(change, path):
        other = copy.deepcopy(model)
        change(other.model)
        [run] = compare(llamas("ref"), capture(other, tmp_path / path)).runs
        return [one.name for one in run.local]

    def scaled(inner):
        inner.layers[2].self_attn.scaling *= 1.3

    def other_eps(inner):
        inner.layers[1].input_layernorm.variance_epsilon = 1e-2

    assert "layers.2.attn.core/forward/context" in changed(scaled, "scaling")
    assert changed(other_eps, "eps") == ["layers.1.input_norm/forward/output"]


def small(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=64,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=16,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return transformers.GPT2LMHeadModel(config).train(), "transformer.h.1.mlp.c_proj"
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=3, use_cache=False
    )
    return transformers.MambaForCausalLM(config).train(), "backbone.layers.1.mixer.out_proj"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gpt2", "layers.1.mlp.down"), ("mamba", "layers.1.mixer.out_proj")],
)
def test_of_a_changed_weight_nothing_else_is_local_forward_or_backward(tmp_path, kind, name):
    model, module = small(kind)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        weight = changed.get_submodule(module).weight
        weight *= 1 + 0.1 * torch.randn_like(weight)
    ref, run = capture(model, tmp_path / "ref"), capture(changed, tmp_path / "run")
    [found] = compare(ref, run).runs
    assert [one.name for one in found.local] == [f"{name}/param/weight"]
    assert {one.name for one in found.suspects} == {f"{name}/param/weight"}
    inherited = [one for one in found.divergences if one.origin == "inherited"]
    assert any("/backward/" in one.name for one in inherited)
    measured = [one.name for one in inherited if one.basis == "measured"]
    assert measured[-1] == "lm_head/forward/output" or measured[-1].startswith("layers.2")


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_zeros_of_another_dtype_are_no_divergence_of_a_bf16_run_from_its_noise(tmp_path, kind):
    model, _ = small(kind)
    ref = capture(model, tmp_path / "ref")
    run, noise = (capture(model, tmp_path / word, dtype=torch.bfloat16) for word in ("a", "b"))
    [found] = compare(ref, run, noise=noise).runs
    assert found.verdict == "agree"
    zeros = [
        j
        for p, j in zip(found.pairs, found.judgements, strict=True)
        if p.name.endswith("bias") and p.metrics.ref.rms == 0
    ]
    assert zeros
    assert {judgement.grade for judgement in zeros} <= {"equal values"}
