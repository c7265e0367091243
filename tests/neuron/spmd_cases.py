"""SPMD over four virtual devices of torch_xla's CPU: run by test_xla_spmd.py."""

from __future__ import annotations

import copy
import os

os.environ["CPU_NUM_DEVICES"] = "4"

import numpy as np
import pytest
import torch
from tests.neuron.lazy import Block, Cost, Xla, assert_same_run
from torch import nn

import tensortap

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def xla() -> Xla:
    os.environ["PJRT_DEVICE"] = "CPU"
    import torch_xla.runtime

    torch_xla.runtime.use_spmd()  # Before anything touches the device.
    found = Xla()
    assert torch_xla.runtime.global_runtime_device_count() == 4
    return found


@pytest.fixture(scope="module")
def sharding(xla):
    from torch_xla.distributed import spmd

    mesh = spmd.Mesh(np.arange(4), (2, 2), ("data", "model"))
    return lambda tensor, *axes: spmd.mark_sharding(tensor, mesh, axes)


def trained(xla: Xla, model: nn.Module, x: torch.Tensor) -> tuple[tensortap.MemorySink, list[Cost]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        xla.sync()

    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        return sink, [xla.cost(step) for _ in range(3)]


def test_sharded_tensors_come_back_whole_for_one_execution_and_one_transfer(xla, sharding):
    model, x = nn.Sequential(Block(8), Block(8)), torch.randn(4, 8)
    twin, there = xla.put(copy.deepcopy(model)), xla.put(x)
    for block in twin:
        sharding(block.up.weight, "model", None)
        sharding(block.down.weight, None, "model")
    sharding(there, "data", None)
    expected, _ = trained(xla, model, x)
    found, costs = trained(xla, twin, there)
    assert_same_run(expected, found)
    assert all(record.placement is None for record in found.records)
    assert [(cost.executions, cost.transfers) for cost in costs] == [(1, 1)] * 3
    assert costs[-1].compilations == 0


def test_the_tap_leaves_the_sharding_of_the_model_alone(xla, sharding):
    model, x = xla.put(nn.Linear(8, 8)), xla.put(torch.randn(4, 8))
    sharding(model.weight, "model", None)

    def shardings() -> list[str]:
        output = model(x)
        xla.sync()
        read = xla.torch_xla._XLAC._get_xla_sharding_spec
        return [read(tensor) for tensor in (model.weight, model.bias, x, output)]

    with torch.no_grad():
        plain = shardings()
        with tensortap.attach(model, tensortap.MemorySink(), values="full", on_error="raise"):
            assert shardings() == plain
    assert any(plain)


def test_a_sharded_wrapper_that_lost_its_tensor_is_a_gap_and_not_a_wrong_value(xla, sharding):
    model, x = xla.put(nn.Linear(8, 8)), torch.randn(4, 8)
    wrapper = sharding(xla.put(x), "data", None)
    sink = tensortap.MemorySink()
    with torch.no_grad(), tensortap.attach(model, sink, values="full"):
        model(wrapper)
    assert torch.equal(sink.find("root/forward/input")[0][1], x)
    [gap] = sink.coverage["gaps"]
    assert gap["name"] == "root/forward/output"
    assert "XLAShardedTensor" in gap["reason"]
