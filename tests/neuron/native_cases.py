"""What the native `neuron` device must show, on a fake of it: run by test_native_device.py."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.core.models import Inside, Stack
from tests.neuron import fake_neuron
from tests.neuron.fake_neuron import waits
from torch import nn

import tensortap
from tensortap.backends import Backend
from tensortap.testing import BackendContract
from tensortap_neuron.native import NeuronBackend

fake_neuron.install()
NEURON = torch.device("neuron")


def same_run(expected: tensortap.MemorySink, found: tensortap.MemorySink) -> None:
    assert found.names() == expected.names()
    for name in expected.names():
        pairs = zip(expected.find(name), found.find(name), strict=True)
        for (record, value), (on_device, copied) in pairs:
            assert on_device.at == record.at
            assert on_device.device == "neuron:0"
            assert torch.allclose(copied, value, atol=1e-5), name
            assert on_device.stats.l2 == pytest.approx(record.stats.l2, rel=1e-5, abs=1e-6), name


class TestNeuronBackend(BackendContract):
    @pytest.fixture
    def backend(self) -> Backend:
        return NeuronBackend()

    @pytest.fixture
    def device(self) -> torch.device:
        return NEURON


def trained(model: nn.Module, x: torch.Tensor, **options) -> tensortap.MemorySink:
    sink = tensortap.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tensortap.attach(model, sink, on_error="raise", **options):
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return sink


def test_a_training_run_is_captured_as_on_the_cpu():
    torch.manual_seed(0)
    model = Stack().eval()
    twin = copy.deepcopy(model).to(NEURON)
    x = torch.randn(2, 8)
    expected = trained(model, x, values="full")
    found = trained(twin, x.to(NEURON), values="full")
    assert found.steps == expected.steps
    same_run(expected, found)


@pytest.mark.parametrize("values", ["stats", "full"])
def test_a_step_waits_for_the_device_once_and_at_its_end(values):
    model, x = Stack().to(NEURON).train(), torch.randn(2, 8).to(NEURON)
    sink = tensortap.MemorySink()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tensortap.attach(model, sink, values=values, on_error="raise"):
        for _ in range(2):
            waits.clear()
            model(x).square().mean().backward()
            assert not waits
            optimizer.step()
            assert waits["synchronize"] == 1
    assert sink.steps == [0, 1]
    assert sink.coverage["complete"]


def test_an_inplace_op_after_the_hook_does_not_change_the_record():
    def overwritten(x):
        y = layer(x)
        y.zero_()
        return y

    layer = nn.Linear(8, 8).to(NEURON)
    model = Inside(overwritten)
    model.layer = layer
    x = torch.randn(2, 8)
    sink = tensortap.MemorySink()
    with torch.no_grad(), tensortap.attach(model, sink, values="full", on_error="raise"):
        model(x.to(NEURON))
    [(record, value)] = sink.find("layer/forward/output")
    expected = copy.deepcopy(layer).cpu()(x)
    assert torch.allclose(value, expected, atol=1e-6)
    assert record.stats.max == pytest.approx(expected.max().item(), rel=1e-6)
    assert sink.find("root/forward/output")[0][1].abs().max() == 0


def test_clones_on_the_device_stay_within_max_pending():
    model, x = Stack(depth=6).to(NEURON).eval(), torch.randn(64, 8).to(NEURON)
    sink = tensortap.MemorySink()
    options = {"values": "full", "max_pending": "32KiB", "on_error": "raise"}
    with torch.no_grad(), tensortap.attach(model, sink, **options) as tap:
        waits.clear()
        model(x)
        assert waits["synchronize"] > 1
        assert 0 < tap._session.transfer.arena.peak <= 32 * 1024
    assert sink.coverage["complete"]
    assert all(payload is not None for payload in sink.payloads)


def test_bf16_fp8_and_integers_keep_their_bits():
    model = nn.Identity().to(NEURON)
    model.anchor = nn.Parameter(torch.ones(1, device=NEURON))
    tensors = [
        torch.randn(3, 5).to(torch.bfloat16),
        torch.randn(3, 5).to(torch.float8_e4m3fn),
        torch.tensor([7, -9, 1 << 20]),
        torch.tensor([True, False]),
        torch.zeros(0, 4),
    ]
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise", phases=("forward",)) as tap:
        model(torch.ones(1).to(NEURON))
        for number, tensor in enumerate(tensors):
            tap.record(f"case{number}/forward/x", tensor.to(NEURON))
    for number, tensor in enumerate(tensors):
        [(record, value)] = sink.find(f"case{number}/forward/x")
        assert value.dtype == tensor.dtype
        assert torch.equal(value.view(torch.uint8), tensor.view(torch.uint8))
        assert record.stats.count == tensor.numel()


class FakeNeuronCompiler:
    """Stands for `torch.compile(backend="neuron")`: runs the graph, and counts graphs.

    TorchNeuron registers a Dynamo backend of that name ("torch.compile backend reference", AWS
    Neuron documentation 2.33). Dynamo, which keeps or drops hooks, is the real one.
    """

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler():
    backend = FakeNeuronCompiler()
    torch._dynamo.register_backend(backend, name="neuron")
    yield backend
    torch._dynamo.backends.registry._COMPILER_FNS.pop("neuron")
    torch.compiler.reset()


def test_a_model_attached_before_its_first_compiled_call_is_captured(compiler):
    model, x = Stack().to(NEURON).eval(), torch.randn(2, 8).to(NEURON)
    plain, sink = tensortap.MemorySink(), tensortap.MemorySink()
    with torch.no_grad():
        with tensortap.attach(model, plain, values="full", on_error="raise"):
            model(x)
        with tensortap.attach(model, sink, values="full", on_error="raise"):
            torch.compile(model, backend="neuron")(x)
    assert compiler.graphs > 1
    same_run(plain, sink)


def test_attaching_after_the_first_compiled_call_is_refused(compiler):
    model, x = Stack().to(NEURON).eval(), torch.randn(2, 8).to(NEURON)
    with torch.no_grad():
        compiled = torch.compile(model, backend="neuron")
        compiled(x)
    with pytest.raises(tensortap.NotSupported, match="Attach before the first call"):
        tensortap.attach(model, tensortap.MemorySink())
