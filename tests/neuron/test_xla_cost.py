"""What capturing costs on XLA, counted by torch_xla's metrics on a model of twelve layers."""

from __future__ import annotations

import pytest
import torch
from tests.neuron.lazy import Cost, Deep, Xla
from torch import nn

import tensortap

pytestmark = pytest.mark.xla

TAPPED = Cost(executions=1, transfers=1, compilations=0)
UNTAPPED = Cost(executions=1, transfers=0, compilations=0)


@pytest.fixture
def model(xla: Xla) -> nn.Module:
    return xla.put(Deep())


@pytest.fixture
def x(xla: Xla) -> torch.Tensor:
    return xla.put(torch.randn(2, 8, 32))


class Training:
    """A step: forward, backward, optimizer, and the synchronisation at its end."""

    def __init__(self, xla: Xla, model: nn.Module, x: torch.Tensor) -> None:
        self.xla, self.model, self.x = xla, model.train(), x
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def __call__(self) -> None:
        self.model(self.x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.xla.sync()

    def costs(self, steps: int) -> list[Cost]:
        return [self.xla.cost(self) for _ in range(steps)]


@pytest.mark.parametrize("values", ["stats", "full"])
def test_a_forward_costs_one_execution_and_one_transfer(xla, model, x, values):
    def forward():
        model(x)
        xla.sync()

    sink = tensortap.MemorySink()
    with torch.no_grad(), tensortap.attach(model, sink, values=values, on_error="raise"):
        first = xla.cost(forward)
        costs = [xla.cost(forward) for _ in range(3)]
    assert (first.executions, first.transfers) == (1, 1)
    assert costs == [TAPPED] * 3
    assert sink.steps == [0, 1, 2, 3]
    assert len(sink.find("layers.11.down/forward/output")) == 4
    assert sink.coverage["complete"]


def test_a_forward_whose_output_is_read_at_once_runs_once_all_the_same(xla, model, x):
    def forward():
        model(x).cpu()

    with torch.no_grad(), tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        costs = [xla.cost(forward) for _ in range(3)]
    assert [cost.executions for cost in costs] == [1, 1, 1]
    assert [cost.transfers for cost in costs] == [2, 2, 2], "the tap's, and that of the output"
    assert costs[1:] == [Cost(1, 2, 0)] * 2


@pytest.mark.parametrize("values", ["stats", "full"])
def test_a_training_step_costs_one_execution_and_one_transfer(xla, model, x, values):
    train = Training(xla, model, x)
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values=values, on_error="raise"):
        first, *costs = train.costs(4)
    assert (first.executions, first.transfers) == (1, 1)
    assert costs == [TAPPED] * 3
    assert sink.steps == [0, 1, 2, 3]
    assert {str(record.name).split("/")[1] for record in sink.records} == {
        "forward", "backward", "param", "grad",
    }  # fmt: skip


def test_other_steps_and_switching_off_and_on_compile_nothing(xla, model, x):
    train = Training(xla, model, x)
    train()
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        train()
    assert train.costs(2) == [UNTAPPED] * 2
    with tensortap.attach(model, again := tensortap.MemorySink(), on_error="raise"):
        assert train.costs(2) == [TAPPED] * 2
    with tensortap.attach(model, some := tensortap.MemorySink(), steps="1,3", on_error="raise"):
        assert train.costs(4) == [UNTAPPED, TAPPED, UNTAPPED, TAPPED]
    assert again.steps == [0, 1]
    assert some.steps == [1, 3]
    assert {record.at.step for record in some.records} == {1, 3}
    assert 2 * len(again.find("layers.3/forward/output")) == 2 * len(
        some.find("layers.3/forward/output")
    )
    assert train.costs(1) == [UNTAPPED]


def test_a_rank_that_is_not_selected_runs_the_same_graph_and_keeps_nothing(
    xla, model, x, monkeypatch
):
    train = Training(xla, model, x)
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        train()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, ranks="0", on_error="raise") as tap:
        assert tap.attached
        assert train.costs(2) == [UNTAPPED] * 2
    assert sink.run is None
    assert not sink.records


def test_payloads_beyond_max_pending_take_more_transfers_of_the_same_execution(xla, model, x):
    train = Training(xla, model, x)
    sink = tensortap.MemorySink()
    options = {"values": "full", "max_pending": "256KiB", "on_error": "raise"}
    with tensortap.attach(model, sink, **options) as tap:
        [cost] = train.costs(1)
        assert tap._session.transfer.arena.peak <= 256 * 1024
    assert cost.executions == 1
    assert cost.transfers > 1
    assert None not in sink.payloads
    assert sink.coverage["complete"]


def test_payloads_that_find_no_room_are_counted_as_dropped(xla, model, x):
    class Slow(tensortap.MemorySink):
        def write(self, record, payload):
            xla.model.wait_device_ops()
            super().write(record, payload)

    train = Training(xla, model, x)
    sink = Slow()
    options = {"values": "full", "max_pending": "64KiB", "on_full": "drop"}
    with tensortap.attach(model, sink, **options):
        assert train.costs(1)[0].executions == 1
    dropped = sum(gap["count"] for gap in sink.coverage["gaps"])
    assert dropped == sink.payloads.count(None) > 0
    assert all(record.stats is not None for record in sink.records)


def test_a_hook_that_copies_to_the_cpu_costs_an_execution_for_each_module(xla, model, x):
    taken = []
    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [
        leaf.register_forward_hook(lambda module, args, output: taken.append(output.cpu()))
        for leaf in leaves
    ]

    def forward():
        model(x)
        xla.sync()

    with torch.no_grad():
        cost = xla.cost(forward)
    for handle in handles:
        handle.remove()
    assert len(taken) == len(leaves) == 48
    assert (cost.executions, cost.transfers) == (48, 48)
