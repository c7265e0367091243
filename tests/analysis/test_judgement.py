"""Presets on pairs of tensors: what is equal, what is beyond a limit, and what is chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tensortap import stats
from tensortap.errors import ConfigError
from tensortap_analysis.captured.moments import Moment
from tensortap_analysis.judging.chance import larger_by_chance, rms_ratio
from tensortap_analysis.judging.presets import PRESETS, judged, preset
from tensortap_analysis.measuring.bounds import bounds_of, said
from tensortap_analysis.metrics import measure_tensors
from tensortap_analysis.pairs.pair import Half, Pair

NAME = "layers.0/forward/output"


def half(tensor):
    return Half(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def pair_of(ref, other, noise=None):
    """Both tensors compared by their values, beside a noise run's."""
    beside = None if noise is None else pair_of(ref, noise)
    metrics = measure_tensors(ref, other)
    return Pair(Moment(NAME), 0, "values", half(ref), half(other), metrics, noise=beside)


def by_statistics(ref, other, noise=None):
    beside = None if noise is None else by_statistics(ref, noise)
    one, two = stats.statistics(ref), stats.statistics(other)
    bounds = bounds_of(one, two, elementwise=True)
    return Pair(
        Moment(NAME), 0, "statistics", half(ref), half(other), said(one, two), bounds, noise=beside
    )


def judge(pair, name="noise", **thresholds):
    [found] = judged([pair], preset(name, thresholds))
    return found


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("ref", "other"),
    [
        (torch.arange(10), torch.arange(10).int()),
        (torch.ones(4, dtype=torch.bool), torch.ones(4).long()),
        (torch.zeros(5, 3), torch.zeros(5, 3).bfloat16()),
        (torch.zeros(5), -torch.zeros(5)),
        (torch.full((5,), math.nan), torch.full((5,), math.nan).bfloat16()),
        (torch.full((5,), math.inf), torch.full((5,), math.inf).half()),
        (torch.empty(0, 3), torch.empty(0, 3).bfloat16()),
        (torch.tensor([1.0, -2.5]), torch.tensor([1.0, -2.5]).bfloat16()),
    ],
)
def test_equal_values_agree_whatever_their_dtype(name, ref, other):
    for noise in (None, ref, other):
        found = judge(pair_of(ref, other, noise), name)
        assert found.excess == 0
        assert found.grade.startswith("equal")


@pytest.mark.parametrize(
    ("name", "key"),
    [("noise", "bhattacharyya"), ("classic", "correlation"), ("port", "cosine")],
)
@pytest.mark.parametrize("value", [1, 1.5, 5])
def test_a_likeness_of_one_or_more_is_no_threshold(name, key, value):
    with pytest.raises(ConfigError, match=f"{key} is a likeness, below 1"):
        preset(name, {key: value})


def test_an_unknown_preset_or_threshold_is_told_all_there_are():
    with pytest.raises(ConfigError, match=r"'clasic'; there are 'noise', 'classic', 'port'\."):
        preset("clasic")
    with pytest.raises(ConfigError, match=r"'rati'; it has 'ratio', 'bhattacharyya'\."):
        preset("noise", {"rati": 2})


def test_huge_differences_overflow_nothing():
    x = torch.full((8,), 1e200, dtype=torch.float64)
    for name in PRESETS:
        assert judge(pair_of(x, -x), name).excess > 1
        assert judge(pair_of(x, -x, x * (1 + 1e-9)), name).excess > 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 31, 32, 64, 256])
def test_errors_of_the_noises_own_distribution_are_beyond_once_in_a_thousand_at_most(size):
    generator = torch.Generator().manual_seed(size)
    ref = torch.randn(1000, size, generator=generator, dtype=torch.float64) * 10
    run, noise = (
        ref + 0.02 * torch.randn(1000, size, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    beyond = [row for row in zip(ref, run, noise, strict=True) if not judge(pair_of(*row)).within]
    assert len(beyond) <= 1


@pytest.mark.parametrize("values", [1, 2, 3, 8, 100, 10_000])
def test_two_samples_are_so_far_apart_once_in_a_thousand(values):
    one, two = np.random.default_rng(0).chisquare(values, (2, 400_000))
    simulated = np.quantile(np.sqrt(one / two), 0.999)
    assert rms_ratio(values) == pytest.approx(simulated, rel=0.1 if values < 3 else 0.05)


def test_few_values_say_so_and_what_is_accepted():
    x, d = torch.tensor([3.0], dtype=torch.float64), 1e-2
    found = judge(pair_of(x, x + 5 * d, x + d))
    assert found.within
    assert found.grade == "5x the noise (few values: up to 955x accepted)"


def test_the_ratio_to_the_noise_is_the_order_and_the_shape_of_errors_only_a_limit():
    generator = torch.Generator().manual_seed(0)
    x, d, e = (torch.randn(20_000, generator=generator, dtype=torch.float64) for _ in range(3))
    lumps = torch.zeros_like(x)
    lumps[::100] = 10 * e[::100]
    near, far, spread = (
        judge(pair_of(x, x + run, x + 1e-2 * d)) for run in (2e-2 * e, 0.5 * e, 1e-2 * lumps * 1.1)
    )
    assert near.excess == pytest.approx(2 / 1.5, rel=0.05)
    assert far.excess == pytest.approx(50 / 1.5, rel=0.05)
    assert spread.excess == 1
    assert "Bhattacharyya" in spread.grade


def test_a_broken_channel_stands_out_though_the_whole_is_closer_than_the_noise():
    generator = torch.Generator().manual_seed(0)
    x, d, e = (torch.randn(40, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    port = x + 1e-5 * e
    assert judge(pair_of(x, port, x + 1e-2 * d)).within
    port[:, 7] += 0.07
    found = judge(pair_of(x, port, x + 1e-2 * d))
    assert not found.within
    assert found.excess == 1
    assert found.grade == "0.876x the noise, but 40 values stand out beyond its largest error"


@pytest.mark.parametrize("tail", [1.0, 1.5, 3.0])
def test_errors_of_heavy_tails_stand_out_once_in_a_thousand_at_most(tail):
    draws = np.random.default_rng(0).standard_t(tail, (2, 1000, 64))
    x = torch.randn(1000, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = (x + 1e-3 * torch.from_numpy(errors) for errors in draws)
    found = [judge(pair_of(*row)).grade for row in zip(x, *runs, strict=True)]
    assert sum("stand out" in grade for grade in found) <= 1


@pytest.mark.parametrize(("one", "two"), [(100, 100), (100, 400), (400, 100)])
def test_the_largest_errors_are_all_of_one_sample_once_in_a_thousand(one, two):
    rng = np.random.default_rng(0)
    draws = rng.standard_cauchy((4000, one)), rng.standard_cauchy((4000, two))
    tops = (np.abs(draws[0]) > np.abs(draws[1]).max(1, keepdims=True)).sum(1)
    ref = torch.zeros(max(one, two))
    allowed = larger_by_chance(*(measure_tensors(ref[:n], ref[:n]) for n in (one, two)))
    assert np.mean(tops >= allowed) <= 0.002


@pytest.mark.parametrize("name", ["classic", "port"])
def test_statistics_can_show_a_difference_but_not_agreement_where_values_are_needed(name):
    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat([x[:10], x[10:].flip(0)]) + 1e-6
    open_question = judge(by_statistics(x, shuffled), name)
    assert open_question.within
    assert not open_question.decided
    shown = judge(by_statistics(x, x + 5), name)
    assert not shown.within
    assert shown.grade.endswith(", at least")
    assert judge(by_statistics(x, x.clone()), name).decided


def test_noise_decides_by_statistics_as_well_as_it_can():
    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert judge(by_statistics(x, x * (1 + 1e-3), x * (1 + 1e-2))).decided
    assert judge(by_statistics(x, x * (1 + 1e-3), x * (1 + 1e-2))).within
    assert not judge(by_statistics(x, x * 1.5, x * (1 + 1e-2))).within


def test_a_noise_run_with_nan_or_of_statistics_does_not_judge_values():
    x = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    holed = x + 1e-2
    holed[3] = math.nan
    assert judge(pair_of(x, x + 1e-2, holed)).estimated
    pair = pair_of(x, x + 1e-2).with_noise(by_statistics(x, x + 1e-2))
    assert judge(pair).estimated
