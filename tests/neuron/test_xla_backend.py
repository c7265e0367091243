"""The XLA backend by itself, what it refuses, and what it says when a model reads values early."""

from __future__ import annotations

import types
import warnings

import pytest
import torch
from tests.neuron.lazy import Block, assert_same_run
from torch import nn

import tensortap
from tensortap.backends import Backend, for_device, lazy_backends
from tensortap.stats import statistics
from tensortap.testing import BackendContract
from tensortap_neuron import xla_runtime
from tensortap_neuron.xla import XlaBackend
from tensortap_neuron.xla_runtime import Runtime

pytestmark = pytest.mark.xla


class TestXlaBackend(BackendContract):
    @pytest.fixture
    def device(self, xla) -> torch.device:
        return xla.device

    @pytest.fixture
    def backend(self, device) -> Backend:
        return for_device(device)


class TestXlaBackendInFloat32(BackendContract):
    """As on a device without float64."""

    @pytest.fixture
    def device(self, xla) -> torch.device:
        return xla.device

    @pytest.fixture
    def backend(self, device) -> Backend:
        return XlaBackend(wide=torch.float32)


class TestXlaBackendWithPublicCalls(BackendContract):
    """As with a torch_xla of another version."""

    @pytest.fixture
    def device(self, xla) -> torch.device:
        return xla.device

    @pytest.fixture
    def backend(self, device) -> Backend:
        return XlaBackend(Runtime(private=False))


def test_the_installed_plugin_serves_xla_tensors(xla):
    assert isinstance(for_device(xla.device), XlaBackend)
    assert lazy_backends([torch.device("cpu"), xla.device]) == [for_device(xla.device)]
    assert for_device(xla.device)._wide is torch.float64


def test_a_value_seen_twice_is_captured_once_and_another_one_is_not(xla):
    backend, x = XlaBackend(), xla.put(torch.arange(6.0))
    shared = backend.reduce(x, exponents=False)
    assert backend.reduce(x, exponents=False) is shared
    assert backend.reduce(x.detach(), exponents=False) is shared
    assert backend.reduce(x, exponents=True) is not shared
    assert backend.reduce(x.view(2, 3), exponents=False) is not shared
    assert backend.snapshot(x, lambda nbytes: None) is backend.snapshot(x, lambda nbytes: None)
    x.add_(1)
    moved = backend.reduce(x, exponents=False)
    x.data.mul_(2)
    assert len({id(one) for one in (shared, moved, backend.reduce(x, exponents=False))}) == 3
    assert backend.flush([shared, moved])[0].max == 5
    assert backend.reduce(x, exponents=False) is not shared, "another graph"


def test_an_inplace_collective_that_keeps_the_id_makes_another_value(xla):
    backend, x = XlaBackend(), xla.put(torch.arange(6.0))
    bindings = xla.torch_xla._XLAC
    before, name = backend.reduce(x, exponents=False), bindings._xla_get_tensor_id(x)
    bindings._xla_all_reduce_inplace("sum", [x], 3.0, [], True)
    assert bindings._xla_get_tensor_id(x) == name
    after = backend.reduce(x, exponents=False)
    assert [one.max for one in backend.flush([before, after])] == [5.0, 15.0]


def test_an_upload_that_comes_late_does_not_change_the_graph(xla):
    model = nn.Sequential(Block(8)).to(xla.device)
    x = torch.randn(3, 8).to(xla.device)
    with torch.no_grad(), tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        costs = [xla.cost(lambda: model(x)) for _ in range(2)]
    assert [cost.compilations for cost in costs] == [1, 0]


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_large_small_and_odd_values_have_the_statistics_of_the_cpu(xla, wide):
    backend = XlaBackend(wide=wide)
    tensors = [
        1e4 + torch.randn(100_000),
        torch.cat([torch.tensor([1e6]), 1 + 1e-3 * torch.randn(9000)]),
        torch.tensor([1e30, -3e30, float("nan"), float("inf"), float("-inf"), 0.0, -0.0]),
        torch.full((7,), 1e-30),
        torch.full((3,), float("nan")),
        torch.randint(-60_000, 60_000, (300, 7)),
        torch.zeros(0, 3),
        torch.tensor(2.5),
        torch.randn(4, 6).t()[1:],
        torch.randn(3, 1).expand(3, 5),
    ]
    found = backend.flush([backend.reduce(xla.put(t), exponents=True) for t in tensors])
    for tensor, stats in zip(tensors, found, strict=True):
        expected = statistics(tensor, exponents=True)
        for key in ("count", "nan", "posinf", "neginf", "zero", "min", "max", "exponents"):
            assert getattr(stats, key) == getattr(expected, key), (tensor, key)
        for key in ("mean", "std", "rms", "l1", "l2"):
            wanted, got = getattr(expected, key), getattr(stats, key)
            assert (got is None) == (wanted is None)
            assert wanted is None or got == pytest.approx(wanted, rel=3e-6, abs=1e-35), key


def test_a_step_through_public_calls_runs_once_and_brings_the_same(xla, monkeypatch):
    model, x = xla.put(nn.Sequential(Block(8))), xla.put(torch.randn(2, 8))

    def captured():
        sink, costs = tensortap.MemorySink(), []
        with torch.no_grad(), tensortap.attach(model, sink, values="full", on_error="raise"):
            for _ in range(2):
                costs.append(xla.cost(lambda: model(x)))
        return sink, costs

    expected, _ = captured()
    public = XlaBackend(Runtime(private=False))
    monkeypatch.setattr("tensortap.backends._for_type", lambda kind: public)
    found, costs = captured()
    assert_same_run(expected, found)
    assert [cost.executions for cost in costs] == [1, 1]
    assert costs[1].transfers > 1


def test_a_version_nobody_looked_at_is_said_and_one_too_old_refused(xla, monkeypatch):
    def version(text):
        found = types.SimpleNamespace(__version__=text, _XLAC=xla.torch_xla._XLAC)
        monkeypatch.setattr(
            xla_runtime, "import_module", lambda name: found if name == "torch_xla" else None
        )

    version("2.99.0")
    with pytest.warns(tensortap.CaptureWarning, match=r"2\.99\.0 is none that tensortap knows"):
        assert Runtime()._private is None
    version("2.1.3")
    with pytest.raises(tensortap.NotSupported, match=r"2\.1\.3 found; 2\.4 or newer"):
        Runtime()


def test_graph_extraction_is_refused(xla, monkeypatch):
    model = xla.put(nn.Linear(2, 2))
    monkeypatch.setenv("NEURON_EXTRACT_GRAPHS_ONLY", "1")
    with pytest.raises(tensortap.NotSupported, match=r"every output is zero\. Attach in the run"):
        tensortap.attach(model, sink := tensortap.MemorySink())
    assert sink.run is None
    assert not model._forward_hooks
    monkeypatch.setenv("NEURON_EXTRACT_GRAPHS_ONLY", "0")
    with torch.no_grad(), tensortap.attach(model, sink):
        model(torch.ones(1, 2, device=xla.device))


class ReadsItsOwn(nn.Module):
    """Decides on a value: part of the graph has to run in the middle of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y if y.sum() > 0 else -y)


def test_a_model_that_reads_its_own_values_is_told_where(xla):
    model, x = xla.put(ReadsItsOwn()), xla.put(torch.randn(2, 8))
    where = r"read a value .* between a/forward/output and b/forward/input"
    with torch.no_grad(), pytest.raises(tensortap.CaptureError, match=where):
        with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
            model(x)
    sink = tensortap.MemorySink()
    with torch.no_grad(), pytest.warns(tensortap.CaptureWarning, match=where) as said:
        with tensortap.attach(model, sink, values="full"):
            model(x)
            model(x)
    assert len([one for one in said if one.category is tensortap.CaptureWarning]) == 1
    assert len(sink.records) == 20
    assert sink.coverage["complete"]
    assert any("between a/forward/output" in note["reason"] for note in sink.coverage["notes"])
    [(_, seen), _], [(_, made), _] = sink.find("a/forward/input"), sink.find("a/forward/output")
    assert torch.allclose(
        made, nn.functional.linear(seen, *(p.cpu() for p in model.a.parameters()))
    )


def test_a_loss_read_before_the_synchronisation_is_told_and_after_it_is_fine(xla):
    model, x = xla.put(nn.Sequential(Block(8))).train(), xla.put(torch.randn(2, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(*, early: bool) -> None:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        if early:
            loss.item()
        xla.sync()
        loss.item()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
            train(early=False)
    with pytest.raises(tensortap.CaptureError, match=r"and the end of the step.*Read it after"):
        with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
            train(early=True)
