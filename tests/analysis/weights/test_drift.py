"""Checkpoints followed through training, against numpy on planted changes."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from tests.analysis.weights.planted import FLOATS, Doubles, as_stored, gaussian, stored

from tensortap.errors import ConfigError
from tensortap_analysis.weights import CheckpointError, Scope
from tensortap_analysis.weights.drift import Drift, alerts, change, track

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def scope(tmp_path: Path) -> Any:
    """Makes a scope of a file with these tensors."""

    def make(tensors: Tensors) -> Scope:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
        return Scope(path)

    return make


def oracle(old: Doubles, new: Doubles) -> dict[str, float]:
    rows = np.linalg.norm(new - old, axis=1) / np.linalg.norm(old, axis=1)
    norms = np.linalg.norm(old), np.linalg.norm(new)
    return {
        "l2_before": norms[0],
        "l2_after": norms[1],
        "l2_norm_ratio": norms[1] / norms[0],
        "relative_change": np.linalg.norm(new - old) / norms[0],
        "cosine": (old * new).sum() / (norms[0] * norms[1]),
        "max_change": np.abs(new - old).max(),
        "unchanged": (old == new).mean(),
        "row_change_max": rows.max(),
        "row_change_at": rows.argmax(),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(40, 30), (1, 500), (700, 1), (3, 300_000)], ids=str)
def test_every_metric_of_a_change_is_what_numpy_says(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = gaussian(*shape)
    old, new = stored(values, dtype), stored(values * 1.1 + gaussian(*shape, 1) * 0.2, dtype)
    new[:, 0] = old[:, 0]
    found, expected = change(old, new), oracle(as_stored(old), as_stored(new))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_the_ratio_is_blind_to_what_the_relative_change_sees() -> None:
    one, two = (stored(gaussian(200, 200, seed), torch.float32) for seed in (0, 1))
    found = change(one, two)
    assert found["l2_norm_ratio"] == pytest.approx(1, abs=0.01)
    assert found["relative_change"] == pytest.approx(math.sqrt(2), abs=0.02)
    assert found["cosine"] == pytest.approx(0, abs=0.02)


def test_dtypes_may_differ_between_checkpoints() -> None:
    values = gaussian(30, 20)
    found = change(stored(values, torch.float32), stored(values, torch.bfloat16))
    assert 0 < found["relative_change"] < 2**-8
    assert found["unchanged"] < 0.1


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_squares_beyond_float64_do_not_overflow(scale: float) -> None:
    old, new = gaussian(10, 10), gaussian(10, 10) * 1.5
    found = change(*(stored(one * scale, torch.float64) for one in (old, new)))
    assert found["l2_norm_ratio"] == pytest.approx(1.5)
    assert found["l2_after"] == pytest.approx(np.linalg.norm(new) * scale)


@pytest.mark.parametrize(("before", "after"), [(1e-200, 1e200), (1e200, 1e-200), (1e-310, 1.0)])
def test_sides_of_very_different_sizes_each_have_their_norm(before: float, after: float) -> None:
    old, new = gaussian(10, 10) * before, gaussian(10, 10, 1) * after
    found = change(*(stored(one, torch.float64) for one in (old, new)))
    assert found["l2_before"] == pytest.approx(np.linalg.norm(old / before) * before, rel=1e-3)
    assert found["l2_after"] == pytest.approx(np.linalg.norm(new / after) * after)
    assert found["cosine"] == pytest.approx(
        (old / before * new / after).sum()
        / np.linalg.norm(old / before) / np.linalg.norm(new / after), rel=1e-3,
    )  # fmt: skip
    assert found["max_change"] == pytest.approx(max(np.abs(old).max(), np.abs(new).max()))


def test_no_cosine_is_beyond_one() -> None:
    for seed in range(20):
        one = stored(gaussian(7, 9, seed), torch.float32)
        assert change(one, one)["cosine"] <= 1
        assert change(one, -one)["cosine"] >= -1


def test_a_row_that_was_nan_leaves_the_row_that_moved_most_unknown() -> None:
    before, after = torch.ones(3, 4), torch.ones(3, 4)
    before[1, 1] = math.nan
    found = change(before, after)
    assert (found["row_change_max"], found["row_change_at"]) == (None, None)
    assert found["unchanged"] == 11 / 12


def test_infinities_that_stay_are_unchanged() -> None:
    one = torch.ones(3, 4)
    one[1, 1] = math.inf
    assert change(one, one)["unchanged"] == 1


def test_what_has_no_value_is_none_and_what_is_not_finite_is_counted() -> None:
    zero, ones = torch.zeros(3, 4), torch.ones(3, 4)
    same = change(zero, zero)
    assert (same["l2_norm_ratio"], same["cosine"], same["unchanged"]) == (None, None, 1)
    grown = change(zero, ones)
    assert (grown["l2_norm_ratio"], grown["relative_change"]) == (math.inf, math.inf)
    assert grown["row_change_max"] is None
    broken = ones.clone()
    broken[1, 1], broken[2, 2] = math.nan, math.inf
    found = change(ones, broken)
    assert (found["not_finite_before"], found["not_finite_after"]) == (0, 2)
    assert found["relative_change"] is None
    assert change(torch.zeros(0, 4), torch.zeros(0, 4))["unchanged"] is None


def trained() -> tuple[Tensors, Tensors]:
    """Two checkpoints: `small` learns, `big` explodes, `low` collapses, `still` does not move."""
    low = gaussian(40, 40, 3)
    u, s, v = np.linalg.svd(low)
    s[0] = 50
    low = (u * s) @ v
    s[1:] *= np.geomspace(1e-1, 1e-4, 39)
    before = {
        "model.layers.0.small.weight": stored(gaussian(50, 40, 0), torch.float32),
        "model.layers.0.big.weight": stored(gaussian(40, 60, 1), torch.float32),
        "model.layers.0.low.weight": stored(low, torch.float32),
        "model.layers.0.still.weight": stored(gaussian(30, 30, 4), torch.bfloat16),
        "model.layers.0.other.weight": stored(gaussian(30, 30, 5), torch.float32),
        "model.layers.0.norm.weight": torch.ones(40),
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["model.layers.0.small.weight"] *= 1 + 1e-3 * torch.randn(50, 40)
    after["model.layers.0.big.weight"] *= 15
    after["model.layers.0.low.weight"] = stored((u * s) @ v, torch.float32)
    after["model.layers.0.other.weight"] = stored(gaussian(30, 30, 6), torch.float32)
    after["model.layers.0.norm.weight"] += 0.01
    return before, after


def test_layers_are_compared_by_name_and_their_spectra_are_those_of_a_scan(scope: Any) -> None:
    before, after = trained()
    found = scope(before).compare_with(scope(after))["layer_comparisons"]
    assert list(found) == [name.removesuffix(".weight") for name in sorted(before)]
    assert found["model.layers.0.big"]["l2_norm_ratio"] == pytest.approx(15)
    assert found["model.layers.0.big"]["spectral_norm_ratio"] == pytest.approx(15)
    assert found["model.layers.0.big"]["condition_growth"] == pytest.approx(1)
    low = found["model.layers.0.low"]
    scans = [scope(one).scan("spectral")["model.layers.0.low"]["spectral"] for one in trained()]
    growth = scans[1]["condition_number"] / scans[0]["condition_number"]
    assert low["condition_growth"] == growth
    assert low["effective_rank_ratio"] < 0.1
    assert "spectral_norm_ratio" not in found["model.layers.0.norm"]
    quick = scope(before).compare_with(scope(after), spectral=False)["layer_comparisons"]
    assert "spectral_norm_ratio" not in quick["model.layers.0.big"]
    assert quick["model.layers.0.big"]["l2_norm_ratio"] == pytest.approx(15)


def issues(drift: Drift, preset: str = "default") -> dict[str, set[tuple[str, str]]]:
    found: dict[str, set[tuple[str, str]]] = {}
    for issue in alerts(drift, preset):
        layer = issue.layer.rpartition(".")[2]
        found.setdefault(layer, set()).add((issue.rule, issue.severity))
    return found


def test_each_layer_that_goes_wrong_is_named_and_no_other(scope: Any) -> None:
    (drift,) = track([scope(one) for one in trained()])
    assert issues(drift) == {
        "big": {("explosion", "critical")},
        "low": {("collapse", "warning")},
        "still": {("stall", "info")},
        "other": {("replaced", "warning")},
    }
    assert alerts(drift)[0].severity == "critical"


def test_classic_alerts_are_those_of_the_older_guide(scope: Any) -> None:
    (drift,) = track([scope(one) for one in trained()])
    found = issues(drift, "classic")
    assert found["big"] == {("explosion", "critical")}
    assert ("stall", "warning") in found["small"]
    assert ("stall", "warning") in found["still"]
    for ratio, rule in ((2.1, "explosion"), (0.49, "vanishing"), (1.5, None), (11, "explosion")):
        row = drift.layers["model.layers.0.small"] | {"l2_norm_ratio": ratio}
        found = issues(Drift("a", "b", {"x": row}), "classic")
        severity = "critical" if ratio > 10 else "warning"
        assert found == ({"x": {(rule, severity)}} if rule else {})
    row = drift.layers["model.layers.0.small"] | {"condition_growth": 101, "l2_norm_ratio": 1.2}
    assert issues(Drift("a", "b", {"x": row}), "classic") == {"x": {("collapse", "critical")}}


def test_nan_that_appears_is_critical(scope: Any) -> None:
    before = {"a.weight": torch.randn(8, 8)}
    after = {"a.weight": before["a.weight"].clone()}
    after["a.weight"][3, 3] = math.nan
    (drift,) = track([scope(before), scope(after)])
    assert issues(drift) == {"a": {("not finite", "critical")}}
    json.dumps(drift.to_json(), allow_nan=False)


def test_updates_that_bfloat16_swallows_are_said(scope: Any) -> None:
    before = {"a.weight": torch.randn(100, 100, dtype=torch.bfloat16)}
    after = {"a.weight": before["a.weight"].clone()}
    after["a.weight"][0, :40] *= 1.01
    (drift,) = track([scope(before), scope(after)])
    assert issues(drift) == {"a": {("lost updates", "info")}}


def test_a_condition_number_that_the_dtype_cannot_resolve_raises_no_alarm(scope: Any) -> None:
    weights = [gaussian(60, 60, seed) for seed in (0, 0)]
    weights[1][5] = weights[1][6] * (1 + 1e-4)
    tensors = [{"a.weight": stored(one, torch.bfloat16)} for one in weights]
    (drift,) = track([scope(one) for one in tensors])
    assert drift.layers["a"]["condition_growth"] > 100
    assert "bfloat16" in drift.layers["a"]["unresolved"]["condition_growth"]
    assert "a" not in issues(drift)
    assert ("collapse", "critical") in issues(drift, "classic")["a"]


def test_many_checkpoints_are_steps_from_one_to_the_next(scope: Any) -> None:
    first = torch.randn(20, 20)
    scopes = [scope({"a.weight": first * 1.5**step}) for step in range(4)]
    steps = track(scopes)
    assert len(steps) == 3
    for step in steps:
        assert step.layers["a"]["l2_norm_ratio"] == pytest.approx(1.5)
        assert step.layers["a"]["relative_change"] == pytest.approx(0.5)
    assert [step.before for step in steps[1:]] == [step.after for step in steps[:-1]]


def test_a_weight_that_comes_goes_or_changes_its_shape_is_said(scope: Any) -> None:
    one, two = torch.randn(4, 4), torch.randn(6, 4)
    scopes = [
        scope({"a.weight": one, "b.weight": one}),
        scope({"a.weight": one, "embed.weight": two}),
        scope({"a.weight": two, "embed.weight": two, "b.weight": one}),
    ]
    first, second = track(scopes)
    assert set(first.layers) == {"a"}
    assert {skipped.name: skipped.reason for skipped in first.skipped} == {
        "b": f"is not in {scopes[1].source.label}", "embed": f"is not in {scopes[0].source.label}",
    }  # fmt: skip
    assert set(second.layers) == {"embed"}
    reasons = {skipped.name: skipped.reason for skipped in second.skipped}
    assert reasons["a"] == "was 4x4 and is 6x4"
    assert "is not in" in reasons["b"]


def test_names_differ_where_the_model_was_wrapped(scope: Any) -> None:
    weight = torch.randn(5, 5)
    plain = scope({"model.layers.0.a.weight": weight, "lm_head.weight": weight * 2})
    wrapped = scope({"module.model.layers.0.a.weight": weight, "module.lm_head.weight": weight})
    found = plain.compare_with(wrapped)["layer_comparisons"]
    assert set(found) == {"model.layers.0.a", "lm_head"}
    assert found["lm_head"]["l2_norm_ratio"] == pytest.approx(0.5)


def test_checkpoints_of_different_models_are_refused(scope: Any) -> None:
    with pytest.raises(CheckpointError, match="No weight is in both"):
        track([scope({"a.weight": torch.ones(2, 2)}), scope({"b.weight": torch.ones(2, 2)})])
    with pytest.raises(ConfigError, match="two checkpoints"):
        track([scope({"a.weight": torch.ones(2, 2)})])
    (drift,) = track([scope({"a.weight": torch.ones(2, 2)}) for _ in range(2)])
    with pytest.raises(ConfigError, match="no threshold 'explosions'"):
        alerts(drift, thresholds={"explosions": 3})
    with pytest.raises(ConfigError, match="no preset"):
        alerts(drift, "old")


def test_of_a_stack_of_experts_the_worst_speaks(scope: Any) -> None:
    stack = torch.randn(4, 32, 24)
    moved = stack.clone()
    moved[2] *= 20
    moved[1] += 0.01 * torch.randn(32, 24)
    name = "model.layers.0.mlp.experts.down_proj"
    (drift,) = track([scope({name: stack}), scope({name: moved})])
    found = drift.layers[name]
    assert (found["expert"], found["experts"]) == (2, 4)
    assert found["l2_norm_ratio"] == pytest.approx(20)
    assert found["spectral_norm_ratio"] == pytest.approx(20)
    assert found["unchanged"] == pytest.approx(0.5, abs=0.01)
    assert ("explosion", "critical") in issues(drift)["down_proj"]
    assert alerts(drift)[0].cause == "The norm of expert 2 is 20 times what it was."
    assert found["l2_after"] == pytest.approx(moved.norm().item())


def test_experts_that_begin_at_zero_do_not_hide_one_that_vanishes_or_explodes(scope: Any) -> None:
    stack = torch.randn(4, 32, 24) / 5
    stack[0] = 0
    for factor, rule in ((0.0, "vanishing"), (20.0, "explosion")):
        after = stack.clone()
        after[0] = torch.randn(32, 24) / 5
        after[3] *= factor
        (drift,) = track([scope({"experts.up": one}) for one in (stack, after)])
        assert drift.layers["experts.up"]["norm_expert"] == 3
        assert issues(drift)["up"] == {(rule, "critical")}
    after = stack.clone()
    after[0] = torch.randn(32, 24) * 20
    (drift,) = track([scope({"experts.up": one}) for one in (stack, after)])
    assert drift.layers["experts.up"]["norm_expert"] == 0
    assert issues(drift)["up"] == {("explosion", "critical")}


def test_experts_are_read_one_after_the_other_and_none_is_kept(
    scope: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def counting(old: torch.Tensor, new: torch.Tensor) -> Any:
        seen.extend((weakref.ref(old), weakref.ref(new)))
        alive.append(sum(one() is not None for one in seen))
        return change(old, new)

    monkeypatch.setattr("tensortap_analysis.weights.drift.tracking.change", counting)
    stack = torch.randn(12, 16, 8)
    track([scope({"mlp.experts.down_proj": stack * at}) for at in (1, 2, 3)])
    assert len(alive) == 24
    assert max(alive) <= 4


def test_spectra_of_a_stack_are_compared_expert_by_expert_in_every_step(scope: Any) -> None:
    stack = torch.randn(3, 16, 8)
    grown = stack * torch.tensor([1.0, 1.0, 5.0])[:, None, None]
    steps = track([scope({"mlp.experts.down_proj": one}) for one in (stack, grown, stack)])
    ratios = [step.layers["mlp.experts.down_proj"]["spectral_norm_ratio"] for step in steps]
    assert ratios == pytest.approx([5, 0.2])


def test_a_stack_that_lost_an_expert_is_another_shape(scope: Any) -> None:
    stack = torch.randn(3, 16, 8)
    both = [scope({"experts.up": one, "a.weight": stack[0]}) for one in (stack, stack[:2])]
    (drift,) = track(both)
    assert [one.reason for one in drift.skipped] == ["was 3x16x8 and is 2x16x8"]


def test_a_table_has_no_spectrum_here_either(scope: Any) -> None:
    table = {"backbone.layers.0.mixer.A_log": torch.rand(32, 8)}
    (drift,) = track([scope(table), scope({name: one * 2 for name, one in table.items()})])
    assert "condition_growth" not in drift.layers["backbone.layers.0.mixer.A_log"]


def test_the_numbers_do_not_depend_on_the_workers(scope: Any) -> None:
    scopes = [scope(one) for one in trained()]
    assert track(scopes, parallel=1) == track(scopes, parallel=3)


@settings(max_examples=60)
@given(
    pair=arrays.array_shapes(min_dims=2, max_dims=2, max_side=6).flatmap(
        lambda shape: st.tuples(*[
            arrays.arrays(np.float64, shape, elements=st.floats(-100, 100, width=32))
        ] * 2)
    )
)  # fmt: skip
def test_any_two_matrices_agree_with_numpy(pair: tuple[Doubles, Doubles]) -> None:
    old, new = pair
    # Below, squares leave float64; rows of zeros have no relative change.
    if min(np.abs(old).max(1).min(), np.abs(new).max()) < 1e-30:
        return
    found = change(torch.from_numpy(old), torch.from_numpy(new))
    expected = oracle(old, new)
    expected.pop("row_change_at")
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
