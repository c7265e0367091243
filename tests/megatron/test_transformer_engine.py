"""Models of Transformer Engine's layers, as faithful fakes, held against Megatron's own layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.megatron import fake_transformer_engine as fake
from tests.megatron import launching
from tests.megatron import quantize_layers as built
from tests.megatron.test_parallel import in_order, moments, names

import tensortap
from tensortap import MemorySink
from tensortap.errors import RunError

pytest.importorskip("megatron.core")
pytestmark = pytest.mark.xdist_group("megatron-engine")

ROUNDING = 1e-5
HIDDEN = re.compile(
    r"layers\.\d\.("
    r"(input|post_attn)_norm/(forward/output|backward/grad_output)"
    r"|(attn|mlp)(\.(q|k|v|qkv|gate|up|gate_up))?/(forward/input|backward/grad_input)(_local)?"
    r"|attn\.core/(forward/probs|backward/grad_probs))"
)
"""What only Megatron's own layers show: behind a fused norm, and inside of attention."""


class Launches(launching.Launches):
    """Runs of the step of `spread.py`, with Megatron's layers or with the fakes."""

    def engine(self, processes: int, **options: Any) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launching, "SCRIPT", Path(fake.__file__))
            return self(processes, **options, engine=True)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory)


def require_common(one: Path, other: Path) -> tuple[set[str], set[str], int]:
    """Names of the first run only, of the second only, and how many common tensors are equal."""
    expected, found = tensortap.open_run(one / "run"), tensortap.open_run(other / "run")
    left, right = set(names(expected)), set(names(found))
    assert not found.problems
    compared = 0
    for name in sorted(left & right):
        for moment in moments(expected, name):
            a = in_order(expected, name, expected.tensor(name, **moment)).double()
            b = in_order(found, name, found.tensor(name, **moment)).double()
            assert a.shape == b.shape, name
            assert (a - b).abs().max() <= ROUNDING * (a.abs().max() or 1.0), name
            compared += 1
    return left - right, right - left, compared


@pytest.mark.parametrize(
    ("processes", "options"), [(1, {}), (2, {"tp": 2, "sequence_parallel": True})], ids=["1", "tp"]
)
def test_every_common_name_has_the_numbers_of_megatrons_own_layers(
    launch: Launches, processes: int, options: dict[str, Any]
) -> None:
    missing, new, compared = require_common(launch(1), launch.engine(processes, **options))
    assert not new
    assert not [name for name in missing if not HIDDEN.fullmatch(name)]
    assert compared > 600


def test_biases_layer_norms_and_shared_keys_have_them_too(launch: Launches) -> None:
    options = {"kind": "biased", "qk_layernorm": True}
    missing, new, compared = require_common(launch(1, **options), launch.engine(2, tp=2, **options))
    assert not new
    assert not [name for name in missing if not HIDDEN.fullmatch(name)]
    assert compared > 700


def test_a_fused_norm_has_its_input_and_parameters_under_its_own_name(launch: Launches) -> None:
    found = set(names(tensortap.open_run(launch.engine(1) / "run")))
    for word in ("input_norm", "post_attn_norm"):
        own = {name for name in found if name.startswith(f"layers.2.{word}/")}
        shown = ("forward/input", "backward/grad_input", "param/weight", "grad/weight")
        assert own == {f"layers.2.{word}/{tensor}" for tensor in shown}
    assert not [name for name in found if "layer_norm" in name]


def test_what_a_fused_layer_hides_is_said(launch: Launches) -> None:
    coverage = tensortap.open_run(launch.engine(1) / "run").coverage()
    said = {note["name"]: note["reason"] for note in coverage["notes"]}
    for name in (
        "input_norm/forward/output",
        "attn.qkv/forward/input",
        "mlp.gate_up/forward/input",
    ):
        assert "inside of a fused kernel" in said[f"layers.1.{name}"]
    assert "without its probabilities" in said["layers.1.attn.core/forward/probs"]
    assert coverage["gaps"] == []


def test_weights_of_grouped_experts_have_the_names_of_their_experts(launch: Launches) -> None:
    """Two ranks of two experts each, against Megatron's own on two data-parallel ranks."""
    alone, dealt = launch(2, kind="sparse"), launch.engine(2, kind="sparse", ep=2)
    expected, found = (tensortap.open_run(path / "run") for path in (alone, dealt))
    parameters = [n for n in names(expected) if re.search(r"experts\.\d.*/(param|grad)/", n)]
    assert len(parameters) == 4 * 4 * 2 * 4  # layers, experts, phases; gate_up, gate, up and down
    for name in parameters:
        torch.testing.assert_close(
            found.tensor(name, step=0), expected.tensor(name, step=0), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(RunError, match="unknown"):
        found.tensor("layers.0.mlp.experts.down/forward/output", step=0, microbatch=0, dp_rank=0)


@pytest.fixture
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


def engine_gpt(**changes: Any) -> Any:
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(0)
    config = built.config(num_layers=1, **changes)
    model = GPTModel(
        config,
        fake.layer_spec(grouped_experts=config.num_moe_experts),
        vocab_size=256,
        max_sequence_length=64,
        position_embedding_type="rope",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_the_weight_of_a_product_in_fp8_is_not_claimed_to_be_the_parameter(fp8: bool) -> None:
    model, sink = engine_gpt(), MemorySink()
    with tensortap.attach(model, sink, on_error="raise") as tap:
        if fp8:
            with fake.fake_fp8_autocast():
                model(**built.batch()).mean().backward()
        else:
            model(**built.batch()).mean().backward()
    used = [n for n in sink.names() if re.search(r"layers.*/(for|back)ward/weight", n)]
    notes = {note["name"]: note["reason"] for note in tap.coverage.report(steps=1)["notes"]}
    for word in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down"):
        name = f"layers.0.{word}/forward/weight"
        assert (name in used) is not fp8
        assert ("narrower format" in notes.get(name, "")) is fp8
        assert f"layers.0.{word}/param/weight" in sink.names()
    assert "lm_head/forward/weight" in sink.names()  # Megatron's own, which knows no fp8.


@pytest.mark.usefixtures("one_rank")
def test_an_input_gradient_is_told_from_a_weight_gradient_of_the_same_shape() -> None:
    """TE's autograd function gives the weight's gradient first."""
    config = built.config(num_layers=1)
    layer = fake.TERowParallelLinear(64, 48, config=config, bias=False)
    torch.nn.init.normal_(layer.weight)
    model = built.gpt(num_layers=1)
    model.decoder.layers[0].mlp.linear_fc2 = layer
    x = torch.randn(48, 64, requires_grad=True)
    sink = MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        layer(x)[0].square().sum().backward()
    [(_, share)] = sink.find("layers.0.mlp.down/backward/grad_input_local")
    torch.testing.assert_close(share, x.grad)
    assert layer.weight.shape == x.shape


@pytest.mark.usefixtures("one_rank")
def test_grouped_experts_on_one_rank_change_no_result_and_leave_no_trace() -> None:
    model = engine_gpt(
        num_moe_experts=4,
        moe_ffn_hidden_size=96,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
    )
    before = built.gradients(model)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    sink = MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        tapped = built.gradients(model)
    assert all(torch.equal(before[name], tapped[name]) for name in before)
    assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    [(_, weight)] = sink.find("layers.0.mlp.experts.3.down/param/weight")
    assert torch.equal(weight, model.decoder.layers[0].mlp.experts.linear_fc2.weight3)
    assert not [name for name in sink.names() if re.search(r"(weight|bias)\d", name)]
