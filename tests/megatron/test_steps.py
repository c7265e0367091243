"""Steps, gradients and undoing with Megatron's own DistributedDataParallel and optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.megatron import quantize_layers as built

import tensortap
from tensortap import MemorySink
from tensortap_megatron import linears

pytestmark = pytest.mark.xdist_group("megatron-steps")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


def trainer(dtype: torch.dtype = torch.float32, *, distributed: bool = False) -> tuple[Any, Any]:
    """A model the way Megatron's training wraps it, and the optimizer it makes for it."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    flags = {half: True} if half else {}
    config = built.config(params_dtype=dtype, num_layers=1, **flags)
    model = built.gpt(num_layers=1, params_dtype=dtype, **flags)
    if half:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    model = DistributedDataParallel(config, ddp, model)
    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        initial_loss_scale=2.0**8,
        **flags,
    )
    return model, get_megatron_optimizer(options, [model])


def step(model: Any, optimizer: Any, *, microbatches: int = 2, factor: float = 1.0) -> bool:
    model.zero_grad_buffer()
    optimizer.zero_grad()
    for _ in range(microbatches):
        (optimizer.scale_loss(model(**built.batch()).float().mean()) * factor).backward()
    model.finish_grad_sync()
    updated, _, _ = optimizer.step()
    return bool(updated)


def records(sink: MemorySink, name: str) -> list[tuple[int, int]]:
    return [(record.at.step, record.at.microbatch) for record, _ in sink.find(name)]


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed-optimizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_ends_when_megatrons_optimizer_has_stepped(
    dtype: torch.dtype, distributed: bool
) -> None:
    model, optimizer = trainer(dtype, distributed=distributed)
    with tensortap.attach(model, sink := MemorySink(), select="layers.0.mlp", on_error="raise"):
        assert step(model, optimizer)
        assert step(model, optimizer, microbatches=1)
    assert records(sink, "layers.0.mlp/forward/output") == [(0, 0), (0, 1), (1, 0)]


def test_a_step_that_overflows_and_is_skipped_is_a_step() -> None:
    model, optimizer = trainer(torch.float16)
    with tensortap.attach(model, sink := MemorySink(), select="layers.0.mlp", on_error="raise"):
        assert not step(model, optimizer, microbatches=1, factor=float("inf"))
        assert step(model, optimizer, microbatches=1)
    assert records(sink, "layers.0.mlp/forward/output") == [(0, 0), (1, 0)]


def test_another_models_optimizer_ends_no_step() -> None:
    model, optimizer = trainer(torch.bfloat16)
    other, its_optimizer = trainer(torch.bfloat16)
    with tensortap.attach(model, sink := MemorySink(), select="layers.0.mlp", on_error="raise"):
        model(**built.batch()).float().mean().backward()
        step(other, its_optimizer, microbatches=1)
        model(**built.batch()).float().mean().backward()
        optimizer.step()
    assert records(sink, "layers.0.mlp/forward/output") == [(0, 0), (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_are_what_main_grad_holds_after_each_microbatch(dtype: torch.dtype) -> None:
    model, _ = trainer(dtype)
    parameter = dict(model.named_parameters())[
        next(n for n, _ in model.named_parameters() if n.endswith("linear_fc2.weight"))
    ]
    model.zero_grad_buffer()
    held = []
    with tensortap.attach(model, sink := MemorySink(), values="full", on_error="raise"):
        for _ in range(2):
            model(**built.batch()).float().mean().backward()
            held.append(parameter.main_grad.clone())
    found = sink.find("layers.0.mlp.down/grad/weight")
    assert [record.dtype for record, _ in found] == ["float32", "float32"]
    for (record, payload), main in zip(found, held, strict=True):
        assert payload is not None
        assert torch.equal(payload, main), record.at
    assert not torch.equal(held[0], held[1])
    assert parameter.grad is None


def test_the_own_share_of_a_linear_is_apart_from_what_its_input_gets_in_all() -> None:
    """The residual goes into a norm alone, but the norm's output into one linear: both equal."""
    model = built.gpt(num_layers=1)
    with tensortap.attach(model, sink := MemorySink(), values="full", on_error="raise"):
        built.gradients(model)
    for word in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down"):
        [(_, local)] = sink.find(f"layers.0.{word}/backward/grad_input_local")
        [(_, total)] = sink.find(f"layers.0.{word}/backward/grad_input")
        assert local is not None
        assert total is not None
        assert torch.equal(local, total)
        [(_, dy)] = sink.find(f"layers.0.{word}/backward/grad_output")
        [(_, weight)] = sink.find(f"layers.0.{word}/forward/weight")
        assert dy is not None
        assert weight is not None
        expected = dy.double() @ weight.double()
        torch.testing.assert_close(local.double(), expected, rtol=1e-5, atol=1e-9)


def test_two_linears_with_one_input_have_shares_that_sum_to_the_total() -> None:
    """A shared expert and the router's experts read the same tokens."""
    model = built.gpt(
        num_layers=1,
        num_moe_experts=2,
        moe_router_topk=2,
        moe_shared_expert_intermediate_size=32,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        moe_ffn_hidden_size=48,
    )
    with tensortap.attach(model, sink := MemorySink(), values="full", on_error="raise"):
        built.gradients(model)
    name = "layers.0.mlp.shared_expert.gate_up/backward/grad_input"
    [(_, total)], [(_, local)] = sink.find(name), sink.find(f"{name}_local")
    assert total is not None
    assert local is not None
    assert not torch.equal(total, local)
    [(_, tokens)] = sink.find("layers.0.mlp/backward/grad_input")
    assert tokens is not None
    assert torch.equal(tokens, total)


def test_detaching_leaves_megatron_as_it_was() -> None:
    from megatron.core.optimizer import optimizer as library

    model, optimizer = trainer()
    classes = (library.MixedPrecisionOptimizer, library.FP32Optimizer, library.ChainedOptimizer)
    before = [dict(vars(kind)) for kind in classes], [dict(vars(m)) for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    tap = tensortap.attach(model, MemorySink(), on_error="raise")
    step(model, optimizer)
    assert vars(library.FP32Optimizer)["step"] is not before[0][1]["step"]
    tap.detach()
    after = [dict(vars(kind)) for kind in classes]
    assert after == before[0]
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == [set(found) for found in before[1]]


def test_a_hook_that_breaks_stops_the_capture_and_not_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any) -> None:
        raise AttributeError("no such thing")

    model = built.gpt(num_layers=1)
    expected = built.gradients(model)
    monkeypatch.setattr(linears, "_watch", broken)
    with pytest.warns(tensortap.CaptureWarning, match="no such thing"):
        with tensortap.attach(model, MemorySink()):
            found = built.gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
