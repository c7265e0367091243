"""Contracts: subclass one to test your own sink, integration or backend.

    class TestMySink(SinkContract):
        @pytest.fixture
        def make_sink(self, tmp_path):
            return lambda: MySink(tmp_path / "out")

Each contract is a plain class of pytest tests; nothing in here imports pytest.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch
from torch import nn

from tensortap.backends import Backend
from tensortap.integration import Integration
from tensortap.names import PHASES, TensorName
from tensortap.records import Coordinates, RunInfo, Statistics, TensorRecord
from tensortap.sinks import MemorySink, TensorSink
from tensortap.stats import statistics
from tensortap.store.dtypes import dtype_name
from tensortap.tap import attach
from tensortap.walk import tensors_in


def example_record(seq: int, tensor: torch.Tensor | None = None, *, step: int = 0) -> TensorRecord:
    """A record of `tensor` (or of statistics only) as a tap would make it."""
    shown = torch.arange(6.0).reshape(2, 3) if tensor is None else tensor
    return TensorRecord(
        name=TensorName("layers.0.mlp.down", "forward", "output"),
        native="model.layers.0.mlp.down_proj",
        at=Coordinates(step=step),
        shape=tuple(shown.shape),
        dtype=dtype_name(shown.dtype),
        device="cpu",
        seq=seq,
        values="stats" if tensor is None else "full",
        stats=statistics(shown),
    )


def example_run() -> RunInfo:
    """What `open` is given."""
    return RunInfo(launch_id="contract", created="2026-01-01T00:00:00+00:00")


class SinkContract:
    """What every `TensorSink` must do; provide a fixture `make_sink` returning new sinks."""

    def test_it_is_a_sink(self, make_sink: Callable[[], TensorSink]) -> None:
        assert isinstance(make_sink(), TensorSink)

    def test_it_takes_records_with_and_without_payload(
        self, make_sink: Callable[[], TensorSink]
    ) -> None:
        sink = make_sink()
        sink.open(example_run())
        payload = torch.randn(4, 5, dtype=torch.bfloat16)
        sink.write(example_record(0), None)
        sink.write(example_record(1, payload), payload)
        sink.end_step(0)
        sink.close()

    def test_it_leaves_the_payload_as_it_was(self, make_sink: Callable[[], TensorSink]) -> None:
        sink = make_sink()
        sink.open(example_run())
        payload = torch.randn(16)
        before = payload.clone()
        sink.write(example_record(0, payload), payload)
        sink.close()
        assert torch.equal(payload, before)

    def test_it_takes_an_empty_and_a_scalar_payload(
        self, make_sink: Callable[[], TensorSink]
    ) -> None:
        sink = make_sink()
        sink.open(example_run())
        for seq, payload in enumerate((torch.empty(0, 3), torch.tensor(1.5))):
            sink.write(example_record(seq, payload), payload)
        sink.close()

    def test_records_after_the_end_of_their_step_are_taken(
        self, make_sink: Callable[[], TensorSink]
    ) -> None:
        sink = make_sink()
        sink.open(example_run())
        sink.end_step(0)
        sink.write(example_record(0, step=0), None)
        sink.end_step(1)
        sink.close()


class IntegrationContract:
    """What every `Integration` must do; provide fixtures `integration` and `model`.

    `model` is a small real model of the framework; the fixture `batch` is what calling it needs,
    a dictionary of keyword arguments.
    """

    def test_it_serves_its_model(self, integration: Integration, model: nn.Module) -> None:
        assert integration.refuse(model) is None

    def test_it_refuses_a_stranger_with_a_sentence(self, integration: Integration) -> None:
        reason = integration.refuse(nn.Linear(2, 2))
        assert reason is None or len(reason.split()) > 3

    def test_every_module_has_one_site_and_every_name_is_unique(
        self, integration: Integration, model: nn.Module
    ) -> None:
        sites = integration.sites(model)
        names = [site.name for site in sites]
        assert len(names) == len(set(names))
        owned = {id(site.module) for site in sites if site.kind == "module"}
        assert owned == {id(module) for module in model.modules()}

    def test_every_name_can_be_parsed(self, integration: Integration, model: nn.Module) -> None:
        for site in integration.sites(model):
            for phase in PHASES:
                text = f"{site.name}/{phase}/output"
                assert str(TensorName.parse(text)) == text

    def test_tapping_changes_no_result(
        self, integration: Integration, model: nn.Module, batch: dict[str, torch.Tensor]
    ) -> None:
        plain = _first_tensor(model(**batch))
        with attach(model, MemorySink(), using=integration.name, on_error="raise"):
            tapped = _first_tensor(model(**batch))
        assert torch.equal(plain, tapped)

    def test_detach_leaves_no_trace(
        self, integration: Integration, model: nn.Module, batch: dict[str, torch.Tensor]
    ) -> None:
        before = [snapshot_of(module) for module in model.modules()]
        with attach(model, MemorySink(), using=integration.name, on_error="raise"):
            model(**batch)
        assert [snapshot_of(module) for module in model.modules()] == before

    def test_a_copy_of_a_tapped_model_is_not_tapped(
        self, integration: Integration, model: nn.Module, batch: dict[str, torch.Tensor]
    ) -> None:
        sink = MemorySink()
        with attach(model, sink, using=integration.name, on_error="raise"):
            model(**batch)
            twin = copy.deepcopy(model)
            pickled = pickle.loads(pickle.dumps(model))
            twin(**batch)
            pickled(**batch)
        alone = MemorySink()
        with attach(model, alone, using=integration.name, on_error="raise"):
            model(**batch)
        assert len(sink.records) == len(alone.records)


class BackendContract:
    """What every `Backend` must do; provide fixtures `backend` and `device`."""

    def test_statistics_equal_those_of_the_cpu(
        self, backend: Backend, device: torch.device
    ) -> None:
        tensor = torch.randn(33, 65)
        [found] = backend.flush([backend.reduce(tensor.to(device), exponents=True)])
        expected = statistics(tensor, exponents=True)
        assert (found.count, found.zero, found.exponents) == (2145, 0, expected.exponents)
        for field in ("min", "max", "mean", "std", "l1", "l2"):
            difference = abs(getattr(found, field) - getattr(expected, field))
            assert difference <= 1e-6 * (1 + abs(getattr(expected, field))), field

    def test_a_batch_of_statistics_comes_back_in_order(
        self, backend: Backend, device: torch.device
    ) -> None:
        tensors = [torch.full((3,), float(value), device=device) for value in range(5)]
        done = backend.flush([backend.reduce(tensor, exponents=False) for tensor in tensors])
        assert [stats.mean for stats in done] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert all(isinstance(stats, Statistics) for stats in done)

    def test_a_snapshot_keeps_the_bits_of_the_moment(
        self, backend: Backend, device: torch.device
    ) -> None:
        tensor = torch.tensor([[1.0, float("nan")], [-0.0, float("inf")]], device=device).t()
        before = tensor.cpu().contiguous().view(torch.int32)
        snapshot = backend.snapshot(tensor, _allocate)
        tensor.zero_()
        host = snapshot.host()
        assert host.is_contiguous()
        assert torch.equal(host.view(torch.int32), before)

    def test_a_strided_snapshot_takes_every_nth_element(
        self, backend: Backend, device: torch.device
    ) -> None:
        tensor = torch.arange(12.0, device=device).reshape(3, 4)
        assert backend.snapshot(tensor, _allocate, stride=5).host().tolist() == [0.0, 5.0, 10.0]


def snapshot_of(module: nn.Module) -> dict[str, object]:
    """A module's `__dict__` with containers copied, to compare before and after."""
    return {key: copy.copy(value) for key, value in vars(module).items()}


def _allocate(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _first_tensor(output: object) -> torch.Tensor:

    return next(tensor for _, tensor in tensors_in("output", output)).detach().clone()
