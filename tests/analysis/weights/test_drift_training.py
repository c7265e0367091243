"""What drift says of a training: a healthy one from its first step, and one that breaks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tensortap_analysis.weights import Scope
from tensortap_analysis.weights.drift import Drift, alerts, overall_alerts, track
from tensortap_analysis.weights.drift.plot import draw_drift
from tensortap_analysis.weights.drift.trend import checkpoint_names, conditions, most_changed, norms
from tensortap_analysis.weights.health import Issue

CONFIG = GPT2Config(
    n_layer=3, n_embd=48, n_head=4, vocab_size=120, n_positions=32, resid_pdrop=0, embd_pdrop=0,
    attn_pdrop=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
PRESETS = ("default", "classic")


@pytest.fixture(scope="module")
def checkpoints() -> list[nn.Module]:
    """A tiny GPT-2 before its first step, after it, and after 10, 20 and 40 steps."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.randint(0, 120, (8, 24)).cumsum(1) % 120
    kept: list[nn.Module] = [copy.deepcopy(model)]
    for step in range(1, 41):
        optimizer.zero_grad()
        model(data, labels=data).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in (1, 10, 20, 40):
            kept.append(copy.deepcopy(model))
    return kept


def drifts(modules: Sequence[nn.Module]) -> tuple[Drift, ...]:
    return track([Scope(module) for module in modules])


def loud(issues: Sequence[Issue]) -> list[tuple[str, str, str]]:
    return [(one.layer, one.rule, one.severity) for one in issues if one.severity != "info"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_healthy_training_is_quiet_from_its_first_step(
    checkpoints: list[nn.Module], preset: str
) -> None:
    steps = drifts(checkpoints)
    assert [loud(alerts(step, preset)) for step in steps] == [[]] * 4
    assert overall_alerts(steps, preset) == []
    (whole,) = drifts([checkpoints[0], checkpoints[2]])
    assert loud(alerts(whole, preset)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_what_leaves_zero_is_said_to_begin(checkpoints: list[nn.Module], preset: str) -> None:
    step = drifts(checkpoints)[0]
    found = alerts(step, preset)
    assert {one.rule for one in found} == {"began"}
    assert {one.layer for one in found} == {name for name in step.layers if "bias" in name}


def broken(module: nn.Module, name: str, how: Callable[[torch.Tensor], object]) -> nn.Module:
    found = copy.deepcopy(module)
    with torch.no_grad():
        how(found.get_parameter(name))
    return found


BIAS = "transformer.h.1.attn.c_attn.bias"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("before", "name", "factor"),
    [
        (2, "transformer.h.2.mlp.c_fc.weight", 20.0),
        (3, "transformer.h.1.ln_2.weight", 20.0),
        (0, BIAS, 3000.0),
        (1, BIAS, 3000.0),
        (3, BIAS, 1000.0),
        (0, "transformer.ln_f.bias", 1e5),
    ],
)
def test_one_weight_that_explodes_is_critical_a_bias_too(
    checkpoints: list[nn.Module], preset: str, before: int, name: str, factor: float
) -> None:
    after = broken(checkpoints[before + 1], name, lambda weight: weight.mul_(factor))
    (step,) = drifts([checkpoints[before], after])
    layer = name.removesuffix(".weight")
    assert loud(alerts(step, preset)) == [(layer, "explosion", "critical")]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_training_that_diverged_as_a_whole_is_critical(
    checkpoints: list[nn.Module], preset: str
) -> None:
    after = copy.deepcopy(checkpoints[1])
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(torch.randn_like(parameter) * 50)
    (step,) = drifts([checkpoints[0], after])
    exploded = {layer for layer, rule, how in loud(alerts(step, preset))
                if (rule, how) == ("explosion", "critical")}  # fmt: skip
    assert exploded == set(step.layers)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_any_more_is_critical(
    checkpoints: list[nn.Module], preset: str, value: float
) -> None:
    name = "transformer.h.0.mlp.c_proj.weight"
    after = broken(checkpoints[3], name, lambda weight: weight[3, 5].fill_(value))
    (step,) = drifts([checkpoints[2], after])
    assert loud(alerts(step, preset)) == [
        ("transformer.h.0.mlp.c_proj", "not finite", "critical")
    ]  # fmt: skip
    back = alerts(drifts([after, checkpoints[3]])[0], preset)
    assert ("not finite", "info") in {(one.rule, one.severity) for one in back}


@pytest.mark.parametrize(("preset", "severity"), [("default", "critical"), ("classic", "warning")])
def test_a_weight_that_became_zeros_is_said(
    checkpoints: list[nn.Module], preset: str, severity: str
) -> None:
    name = "transformer.h.0.attn.c_proj.weight"
    (step,) = drifts([checkpoints[3], broken(checkpoints[4], name, torch.Tensor.zero_)])
    assert loud(alerts(step, preset)) == [("transformer.h.0.attn.c_proj", "vanishing", severity)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_lora_that_leaves_zero_is_quiet_and_one_that_explodes_is_not(preset: str) -> None:
    torch.manual_seed(0)
    zeros, begun, on = (
        [torch.randn(64, 8) * size for _ in range(4)] for size in (0.0, 2e-4, 0.016)
    )
    for step in drifts([adapters(zeros), adapters(begun), adapters(on)]):
        found = alerts(step, preset)
        assert {(one.rule, one.severity) for one in found} == {("began", "info")}
    on[2] *= 300
    (step,) = drifts([adapters(zeros), adapters(on)])
    assert loud(alerts(step, preset)) == [("2.lora_B", "explosion", "critical")]


def adapters(weights: Sequence[torch.Tensor]) -> nn.Module:
    found = nn.ModuleList()
    for weight in weights:
        layer = nn.Module()
        layer.lora_B = nn.Linear(8, 64, bias=False)
        layer.lora_B.weight.data = weight
        found.append(layer)
    return found


def test_matrices_of_another_seed_are_one_warning(checkpoints: list[nn.Module]) -> None:
    torch.manual_seed(5)
    (step,) = drifts([checkpoints[0], GPT2LMHeadModel(CONFIG)])
    assert loud(alerts(step)) == [("all weights", "replaced", "warning")]
    assert alerts(step)[0].cause.startswith("14 of 14 matrices")


def test_a_condition_number_that_matrices_of_the_shape_have_is_no_collapse() -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(64, 64, dtype=torch.float64))
    s = torch.linspace(16, 0.3, 64, dtype=torch.float64)
    modules = []
    for smallest in (2e-1, 5e-4, 1e-7):
        one = nn.Linear(64, 64, bias=False, dtype=torch.float64)
        s[-1] = smallest
        one.weight.data = (u * s) @ v
        modules.append(one)
    usual, far = drifts(modules)
    assert usual.layers["weight"]["condition_growth"] == pytest.approx(400, rel=1e-6)
    assert loud(alerts(usual)) == []
    assert loud(alerts(far)) == [("weight", "collapse", "warning")]
    assert ("weight", "collapse", "critical") in loud(alerts(usual, "classic"))


def linear(weight: torch.Tensor) -> nn.Module:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    found.weight.data = weight
    return found


@pytest.mark.parametrize(
    ("gain", "factor", "told"),
    [(0.2, 5, []), (2.0, 5, ["warning"]), (0.2, 11, ["critical"]), (2.0, 0.3, ["warning"])],
)
def test_growth_is_told_where_it_is_far_or_makes_a_layer_large(
    gain: float, factor: float, told: list[str]
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * gain / 8
    (step,) = drifts([linear(weight), linear(weight * factor)])
    assert [severity for *_, severity in loud(alerts(step))] == told
    (classic,) = loud(alerts(step, "classic"))
    assert classic[2] == ("critical" if factor > 10 else "warning")


def test_a_matrix_is_replaced_when_what_it_was_is_gone_not_when_more_was_added() -> None:
    torch.manual_seed(0)
    one, two = torch.randn(2, 64, 64) / 40
    for after, gone in (
        (one + 3 * two, False),
        (0.4 * one, False),
        (two, True),
        (-one, True),
        (one[torch.randperm(64)], True),
    ):
        (step,) = drifts([linear(one), linear(after)])
        assert (("weight", "replaced", "warning") in loud(alerts(step))) == gone


@pytest.mark.parametrize(
    ("ratio", "stalls"), [(0.99, True), (1.01, True), (0.9899, False), (1.0101, False)]
)
def test_the_guides_stall_holds_at_its_ends(ratio: float, stalls: bool) -> None:
    one, two = (nn.Linear(16, 16, bias=False, dtype=torch.float64) for _ in range(2))
    two.weight.data = one.weight.data * ratio
    (step,) = drifts([one, two])
    row = dict(step.layers["weight"]) | {"l2_norm_ratio": ratio}
    found = alerts(Drift("a", "b", {"weight": row}), "classic")
    assert [issue.rule for issue in found] == ["stall"] * stalls


def test_a_layer_that_turns_at_one_norm_is_no_stall() -> None:
    torch.manual_seed(0)
    one, two = (nn.Linear(16, 16, bias=False) for _ in range(2))
    two.weight.data = one.weight.data + 0.07 * torch.randn(16, 16) * one.weight.std()
    two.weight.data *= one.weight.norm() / two.weight.norm()
    assert alerts(drifts([one, two])[0], "classic") == []


def test_pictures_name_what_broke_and_not_what_began(checkpoints: list[nn.Module]) -> None:
    after = broken(checkpoints[3], BIAS, lambda weight: weight.mul_(1000))
    broken_too = "transformer.h.2.mlp.c_fc"
    with torch.no_grad():
        after.get_parameter(f"{broken_too}.weight")[0, 0] = math.nan
    steps = drifts([checkpoints[0], checkpoints[2], after])
    assert most_changed(steps, list(steps[0].layers))[:2] == [broken_too, BIAS]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (("runs/step1", "runs/step2"), ["step1", "step2"]),
        (("r/c-1/model.safetensors", "r/c-2/model.safetensors"), ["c-1/model", "c-2/model"]),
        (("r/1/hf/m.pt", "r/2/hf/m.pt"), ["1/hf/m", "2/hf/m"]),
        (("same", "same"), ["same", "same"]),
        (("org/model", "GPT2LMHeadModel"), ["model", "GPT2LMHeadModel"]),
    ],
)
def test_checkpoints_are_named_by_as_much_of_their_path_as_tells_them_apart(
    labels: tuple[str, str], names: list[str]
) -> None:
    assert checkpoint_names([Drift(*labels, {})]) == names


def test_a_trend_of_norms_begins_where_there_is_one(checkpoints: list[nn.Module]) -> None:
    steps = drifts(checkpoints)
    line = norms(steps, BIAS)
    sizes = [module.get_parameter(BIAS).norm().item() for module in checkpoints]
    assert [at for at, _ in line] == [0, 1, 2, 3, 4]
    assert [value for _, value in line] == pytest.approx([size / sizes[1] for size in sizes])


def test_a_singular_matrix_does_not_flatten_the_other_lines(
    checkpoints: list[nn.Module], tmp_path: Path
) -> None:
    name = "transformer.h.2.attn.c_proj.weight"
    after = broken(checkpoints[4], name, lambda weight: weight.copy_(weight[:1].clone()))
    with torch.no_grad():
        after.get_parameter("transformer.h.0.mlp.c_fc.weight")[0, 0] = math.inf
    steps = drifts([checkpoints[3], after])
    line = dict(conditions(steps, "transformer.h.2.attn.c_proj"))
    assert line[0] < 1e6 < line[1] <= 2**53
    assert draw_drift(steps, tmp_path / "d.png").stat().st_size > 10_000
