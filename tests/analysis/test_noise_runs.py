"""Noise runs that are none, and what is said and judged then."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture_plain, noisy_output
from tests.core.store.building import info, record, write_run

from tensortap.errors import ConfigError
from tensortap.records import Part, Placement
from tensortap.stats import statistics
from tensortap_analysis import compare

LAYER = "layers.{}/forward/output"


def run_of(path, tensors, values="full", **fields):
    kept = [None if values == "stats" else t for t in tensors.values()]
    rows = [
        (record(n, None, seq, shape=tuple(t.shape), values=values, stats=statistics(t)), k)
        for seq, ((n, t), k) in enumerate(zip(tensors.items(), kept, strict=True))
    ]
    return write_run(path, rows, info(**fields))


def off(tensors, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: t + size * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


@pytest.fixture
def layers():
    generator = torch.Generator().manual_seed(0)
    return {LAYER.format(n): torch.randn(64, 64, generator=generator) for n in range(3)}


def test_a_nan_of_the_noise_run_excuses_nothing(tmp_path, layers):
    names = list(layers)
    ref = run_of(tmp_path / "ref", layers)
    wrong = off(layers, 0.9, seed=2) | off({names[0]: layers[names[0]]}, 0.01, seed=3)
    run = run_of(tmp_path / "run", wrong)
    noisy = off(layers, 1e-3, seed=1)
    noisy[names[1]][0, 0] = math.nan
    [found] = compare(ref, run, noise=run_of(tmp_path / "noise", noisy)).runs
    assert names[1] in [one.name for one in found.local]
    assert found.warnings == (
        "The noise run has NaN or infinity of its own in 1 of 3 tensors; theirs is estimated.",
    )


def test_a_run_that_is_its_own_noise_is_refused_and_among_several_warned_of(tmp_path, layers):
    ref = run_of(tmp_path / "ref", layers)
    bad = run_of(tmp_path / "bad", off(layers, 0.5, seed=1))
    with pytest.raises(ConfigError, match="is the run that it is to judge"):
        compare(ref, bad, noise=bad)
    with pytest.raises(ConfigError, match="is the run that it is to judge"):
        compare(ref, bad, noise=tmp_path / "." / "bad")
    [found] = compare(ref, bad, noise=shutil.copytree(bad, tmp_path / "copy")).runs
    assert any("by definition it agrees" in text for text in found.warnings)
    other = run_of(tmp_path / "other", off(layers, 0.5, seed=2))
    one, two = compare(ref, bad, other, noise=bad).runs
    assert any("by definition it agrees" in text for text in one.warnings)
    assert not any("by definition it agrees" in text for text in two.warnings)


def test_noise_of_another_model_is_warned_of(tmp_path, layers):
    ref = run_of(tmp_path / "ref", layers, model_class="Llama")
    run = run_of(tmp_path / "run", off(layers, 1e-3, seed=1), model_class="Llama")
    noise = run_of(tmp_path / "noise", off(layers, 1e-3, seed=2), model_class="GPT2")
    [found] = compare(ref, run, noise=noise).runs
    assert f"The noise run {noise} is of another model: GPT2, REF is Llama." in found.warnings


def test_swapped_runs_are_told_by_noise_far_beyond_rounding(tmp_path, layers):
    fp32 = run_of(tmp_path / "fp32", layers)
    bf16 = run_of(tmp_path / "bf16", {n: t.bfloat16().float() for n, t in layers.items()})
    mxfp4 = run_of(tmp_path / "mxfp4", off(layers, 0.16, seed=1))
    [found] = compare(mxfp4, fp32, noise=bf16).runs
    assert found.verdict == "agree"
    [warning] = [text for text in found.warnings if "is REF the reference" in text]
    assert warning.startswith(f"The noise run {bf16} differs from REF by 0.16 ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bf16_noise_is_not_suspected_in_whatever_dtype_it_is_stored(tmp_path, layers, dtype):
    fp32 = run_of(tmp_path / "fp32", layers)
    rounded = {n: t.bfloat16().to(dtype) for n, t in layers.items()}
    rows = [(record(n, t, seq), t) for seq, (n, t) in enumerate(rounded.items())]
    bf16 = write_run(tmp_path / "bf16", rows)
    run = run_of(tmp_path / "run", off(layers, 1e-3, seed=1))
    assert compare(fp32, run, noise=bf16).runs[0].warnings == ()


def test_noise_of_statistics_does_not_judge_values_and_that_is_said(tmp_path, layers):
    ref = run_of(tmp_path / "ref", layers)
    run = run_of(tmp_path / "run", off(layers, 1e-3, seed=1))
    noise = run_of(tmp_path / "noise", off(layers, 1e-3, seed=2), values="stats")
    [found] = compare(ref, run, noise=noise).runs
    assert found.estimated
    assert any(
        text.startswith("Of 3 of 3 tensors the noise run, or the run, has statistics only")
        for text in found.warnings
    )


def test_limits_that_were_measured_come_before_estimated_ones(tmp_path, layers):
    names = list(layers)
    ref = run_of(tmp_path / "ref", layers)
    run = run_of(tmp_path / "run", off(layers, 0.1, seed=1))
    noise = run_of(tmp_path / "noise", {names[2]: off(layers, 0.01, seed=2)[names[2]]})
    [found] = compare(ref, run, noise=noise).runs
    assert found.ranked[0][0].name == names[2]
    assert found.worst.name == names[2]
    assert found.ranked[0][1].excess < found.ranked[1][1].excess


@pytest.mark.parametrize("split", ["run", "ref", "noise"])
def test_noise_is_found_where_tensors_are_fused_otherwise(tmp_path, split):
    name = "layers.0.attn.{}/forward/output"
    parts = tuple(
        Part(f"layers.0.attn.{word}", -1, ((start, size),))
        for word, start, size in (("q", 0, 64), ("k", 64, 32), ("v", 96, 32))
    )
    place = Placement((40, 128), parts=parts)

    def written(who, tensor):
        rows = [(record(name.format("qkv"), tensor, placement=place), tensor)]
        if who == split:
            pieces = zip("qkv", tensor.split((64, 32, 32), dim=1), strict=True)
            named = [(name.format(word), piece.contiguous()) for word, piece in pieces]
            rows = [(record(n, t, seq), t) for seq, (n, t) in enumerate(named)]
        return write_run(tmp_path / who, rows)

    x = torch.randn(40, 128)
    ref, noise = written("ref", x), written("noise", x.bfloat16())
    [found] = compare(ref, written("run", x + 1e-3 * torch.randn(40, 128)), noise=noise).runs
    if split == "noise":  # who was compared as a whole has no noise of its parts
        assert found.warnings[0].endswith("has none of the tensors; rounding is estimated instead.")
    else:
        assert found.warnings == ()
        assert found.verdict == "agree"
        assert not found.estimated


def test_a_loss_of_one_value_is_no_divergence_of_a_run_that_is_only_noise(tmp_path):
    model = PlainMlp()
    ref = capture_plain(model, tmp_path / "ref")
    run, noise = (
        capture_plain(model, tmp_path / word, broken=[noisy_output("layers.0.up", size)])
        for word, size in (("run", 1e-3), ("noise", -1e-3))
    )
    assert compare(ref, run, noise=noise).verdict == "agree"
