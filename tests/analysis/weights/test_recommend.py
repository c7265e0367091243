"""What is recommended for scanned weights, checked against the weights themselves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tests.analysis.weights.planted import gaussian, with_spectrum
from torch import nn

from tensortap import formats
from tensortap.errors import ConfigError
from tensortap_analysis.weights import Options, ScanResult, Scope
from tensortap_analysis.weights.recommend import (
    SCHEMES,
    compression_plan,
    generate_quant_config,
    quant_plan,
    suggest_compression,
)


def linear(values: np.ndarray, dtype: torch.dtype = torch.float32) -> nn.Linear:  # type: ignore[type-arg]
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    layer.weight = nn.Parameter(torch.from_numpy(values).to(dtype))
    return layer


def model() -> nn.Sequential:
    """An attention whose v has heavy tails, an embedding, a low rank, a head."""
    outliers = np.random.default_rng(3).standard_t(2, (128, 128))
    block = nn.Module()
    block.q_proj, block.k_proj = linear(gaussian(128, 128, 1)), linear(gaussian(128, 128, 2))
    block.v_proj = linear(outliers)
    block.down_proj = linear(gaussian(128, 256, 4))
    block.odd = linear(gaussian(64, 100, 5))
    block.low = linear(with_spectrum(128, 128, np.linspace(2, 1, 4)))
    block.embed = nn.Embedding(300, 32)
    whole = nn.Module()
    whole.block, whole.lm_head = block, linear(gaussian(300, 128, 6))
    return whole  # type: ignore[return-value]


@pytest.fixture(scope="module")
def result() -> ScanResult:
    torch.manual_seed(0)
    return Scope(model()).scan(["spectral", "quantization"])


def sqnr_db(layer: nn.Linear, name: str) -> float:
    values = layer.weight.detach()
    options = {"scale": "channel"} if name == "int8" else {}
    error = values - formats.get(name, **options).fake_quantize(values)
    return float(10 * torch.log10(values.double().square().sum() / error.double().square().sum()))


def test_each_layer_gets_the_fewest_bits_that_keep_what_is_wanted(result: ScanResult) -> None:
    plan = {choice.layer: choice for choice in quant_plan(result, sqnr_db=18).choices}
    assert plan["block.down_proj"].format in ("int4", "mxfp4")
    assert plan["block.odd"].format == "int8"
    for layer, choice in plan.items():
        if choice.format is not None:
            module = dict(model().named_modules())[layer]
            assert isinstance(module, nn.Linear)
            assert choice.sqnr_db == pytest.approx(sqnr_db(module, choice.format), abs=1e-3)
            assert choice.sqnr_db >= 18


def test_a_format_with_blocks_is_not_given_to_columns_it_does_not_divide(
    result: ScanResult,
) -> None:
    plan = quant_plan(result, sqnr_db=0)
    for choice in plan.choices:
        if choice.format is not None:
            assert result.facts[choice.layer].shape[-1] % SCHEMES[choice.format].block == 0
    assert "block.odd" in plan.by_format()["int8"]


def test_fused_siblings_share_the_format_of_the_most_sensitive(result: ScanResult) -> None:
    plan = {choice.layer: choice for choice in quant_plan(result, sqnr_db=18).choices}
    three = [plan[f"block.{word}_proj"] for word in "qkv"]
    assert len({choice.format for choice in three}) == 1
    alone = {choice.layer: choice for choice in quant_plan(result, sqnr_db=18).choices}
    assert alone["block.down_proj"].format != three[0].format


def test_what_a_layer_is_given_for_its_siblings_sake_is_said(result: ScanResult) -> None:
    plan = {choice.layer: choice for choice in quant_plan(result, sqnr_db=18).choices}
    joined = "goes with v_proj: engines join them into one matrix"
    assert [plan[f"block.{word}_proj"].reason for word in "qk"] == [joined] * 2
    left = {choice.layer: choice for choice in quant_plan(result, sqnr_db=43).choices}
    assert [left[f"block.{word}_proj"].reason for word in "qk"] == [joined] * 2
    value = max(
        sqnr_db(dict(model().named_modules())["block.v_proj"], name)  # type: ignore[arg-type]
        for name in SCHEMES
    )
    assert left["block.v_proj"].format is None
    assert left["block.v_proj"].reason == f"no format keeps 43 dB: int8 leaves {value:.1f} dB"


def test_a_stack_bears_the_rank_that_its_neediest_expert_needs() -> None:
    experts = np.stack([gaussian(64, 64, seed) for seed in range(4)])
    experts[2] = with_spectrum(64, 64, np.linspace(2, 1, 12))
    stack = nn.Module()
    stack.experts = nn.Module()
    stack.experts.down_proj = nn.Parameter(torch.from_numpy(experts))
    for error in (0.1, 0.35, 0.9):
        for plan in compression_plan(Scope(stack).scan("spectral"), error=error):
            for rank, said in plan.errors.items():
                s = np.linalg.svd(experts, compute_uv=False)
                left = np.sqrt((s[:, rank:] ** 2).sum(1) / (s**2).sum(1)).max()
                assert left <= said + 1e-9
            assert plan.error <= error


def test_a_flat_low_rank_is_suggested_as_it_is() -> None:
    whole = nn.Sequential(linear(with_spectrum(64, 64, np.ones(3)), torch.float64))
    [plan] = compression_plan(Scope(whole).scan("spectral"))
    assert plan.rank == 3


def test_more_is_kept_with_more_bits_and_in_the_end_nothing_is_quantised(
    result: ScanResult,
) -> None:
    bits = [quant_plan(result, sqnr_db=wanted).bits for wanted in (0, 18, 30, 40, 400)]
    assert bits == sorted(bits)
    last = quant_plan(result, sqnr_db=400)
    assert last.by_format() == {}
    assert any("no format keeps 400 dB" in (choice.reason or "") for choice in last.choices)


def test_layers_that_are_copies_of_each_other_are_all_in_the_plan() -> None:
    layers = nn.Sequential(*(linear(gaussian(128, 128)) for _ in range(3)))
    layers.lm_head = linear(gaussian(128, 128))
    found = Scope(layers).scan("quantization")
    [group] = quant_plan(found, sqnr_db=18).config()["config_groups"].values()
    assert group["targets"] == ["0", "1", "2"]
    assert quant_plan(found).ignore == ["lm_head"]
    widths = generate_quant_config(found)
    assert sorted(layer for some in widths.values() for layer in some) == ["0", "1", "2", "lm_head"]


def test_the_last_layer_is_left_alone_unless_it_is_asked_for(result: ScanResult) -> None:
    assert "lm_head" in quant_plan(result).ignore
    assert "lm_head" in quant_plan(result, keep=()).by_format()["int8"]


def test_what_is_no_linear_module_is_neither_a_target_nor_ignored(result: ScanResult) -> None:
    plan = quant_plan(result)
    assert "block.embed" not in plan.ignore
    assert all("block.embed" not in layers for layers in plan.by_format().values())


def test_the_configuration_has_the_words_of_compressed_tensors(result: ScanResult) -> None:
    config = json.loads(json.dumps(quant_plan(result).config()))
    assert set(config) == {"config_groups", "ignore"}
    group = config["config_groups"]["int8"]
    assert set(group) == {"targets", "weights"}
    assert group["weights"] == {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
    }  # fmt: skip
    named = [name for group in config["config_groups"].values() for name in group["targets"]]
    linears = {n for n, module in model().named_modules() if isinstance(module, nn.Linear)}
    assert sorted(named + config["ignore"]) == sorted(linears)


def test_a_plan_is_made_from_a_saved_scan_too(
    result: ScanResult, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("scan") / "report.json"
    result.save(path)
    loaded = ScanResult.load(path)
    assert quant_plan(loaded) == quant_plan(result)
    assert compression_plan(loaded) == compression_plan(result)
    json.dumps(quant_plan(loaded).to_json(), allow_nan=False)
    json.dumps([plan.to_json() for plan in compression_plan(loaded)], allow_nan=False)


def test_layers_without_an_sqnr_are_left_alone_and_it_is_said_why() -> None:
    whole = nn.Sequential(linear(np.zeros((8, 128))), linear(np.full((8, 128), np.nan)))
    plan = quant_plan(Scope(whole).scan("quantization"))
    assert [choice.format for choice in plan.choices] == [None, None]
    assert [choice.reason for choice in plan.choices] == [
        "all values are 0", "not finite: 1,024 NaN",
    ]  # fmt: skip


def test_what_cannot_be_answered_is_said(result: ScanResult) -> None:
    with pytest.raises(ConfigError, match="no scheme for 'hifp8'"):
        quant_plan(result, formats=("hifp8",))
    few = Scope(model()).scan("quantization", options=Options(formats=()))
    with pytest.raises(ConfigError, match="no SQNR of mxfp4"):
        quant_plan(few, formats=("mxfp4",))
    assert quant_plan(few, formats=("int8",)).by_format()
    with pytest.raises(ConfigError, match="no spectra"):
        compression_plan(few)
    with pytest.raises(ConfigError, match="no quantization"):
        quant_plan(Scope(model()).scan("norms"))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        compression_plan(result, error=2)


def test_a_low_rank_is_suggested_with_the_error_it_really_leaves(result: ScanResult) -> None:
    plans = {plan.layer: plan for plan in compression_plan(result)}
    assert set(plans) == {"block.low"}
    plan = plans["block.low"]
    assert (plan.rank, plan.full_rank) == (4, 128)
    assert plan.saved == 128 * 128 - 4 * 256
    assert plan.share == plan.saved / (128 * 128)
    values = next(m for n, m in model().named_modules() if n == "block.low").weight.detach()  # type: ignore[union-attr]
    u, s, v = torch.linalg.svd(values.double())
    for rank, error in plan.errors.items():
        left = values.double() - (u[:, :rank] * s[:rank]) @ v[:rank]
        measured = float(left.norm() / values.double().norm())
        assert error >= measured - 1e-6
        if rank in (1, 2):
            assert error == pytest.approx(measured, rel=1e-6)


def test_a_looser_error_suggests_more_and_never_what_is_larger(result: ScanResult) -> None:
    tight, loose = (compression_plan(result, error=error) for error in (0.1, 0.9))
    assert {plan.layer for plan in tight} < {plan.layer for plan in loose}
    assert all(plan.saved > 0 and plan.error <= 0.9 for plan in loose)
    assert [plan.saved for plan in loose] == sorted((p.saved for p in loose), reverse=True)


def layer(outliers: float | None, sqnr: float | None) -> dict[str, dict[str, float | None]]:
    return {"quantization": {"extreme_outlier_percentage": outliers, "sqnr_db": sqnr}}


def test_classic_widths_are_those_of_the_older_guide() -> None:
    found = generate_quant_config({
        "clean": layer(0.05, 45), "edge": layer(0.1, 45), "loud": layer(0.05, 40),
        "wide": layer(0.99, 30.1), "wild": layer(1.0, 50), "noisy": layer(0.05, 30),
        "unknown": layer(None, None), "unmeasured": {},
    })  # fmt: skip
    assert found == {
        "int8_layers": ["clean"],
        "int16_layers": ["edge", "loud", "wide"],
        "fp16_layers": ["wild", "noisy", "unknown", "unmeasured"],
    }


def test_classic_compression_is_that_of_the_older_guide_with_the_real_error_beside_it() -> None:
    def spectral(stable: float | None, errors: dict[str, float]) -> dict[str, dict[str, object]]:
        return {"spectral": {"stable_rank": stable, "total_rank": 100, "rank_errors": errors}}

    layers = {
        "half": spectral(49, {"32": 0.7}), "thin": spectral(9, {"4": 0.95}),
        "low": spectral(19, {}), "full": spectral(50, {}), "zero": spectral(None, {}),
    }  # fmt: skip
    found = suggest_compression(layers, most=math.inf)
    assert [one.layer for one in suggest_compression(layers)] == ["low"]
    assert [one.layer for one in suggest_compression(layers, most=0.7)] == ["low", "half"]
    rows = [(one.layer, one.method, one.rank, one.saving, one.error) for one in found]
    assert rows == [
        ("thin", "LoRA", 4, 95, 0.95), ("low", "LoRA", 8, 90, None),
        ("half", "low-rank", 32, 50, 0.7),
    ]  # fmt: skip
