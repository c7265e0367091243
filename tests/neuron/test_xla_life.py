"""A tap on XLA from attach to detach: steps, several models, processes, and what is left alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.neuron.lazy import Block
from torch import nn
from torch.nn import functional

import tensortap
from tensortap.backends import for_device

pytestmark = pytest.mark.xla


def test_detaching_where_no_graph_may_run_is_an_error(xla):
    model = xla.put(nn.Linear(4, 4))
    tap = tensortap.attach(model, tensortap.MemorySink(), on_error="raise")

    def step():
        with torch.no_grad():
            model(torch.ones(1, 4, device=xla.device))
        tap.detach()

    with pytest.raises(tensortap.CaptureError, match=r"full_graph=True.*Detach after it"):
        xla.torch_xla.compile(step, full_graph=True)()
    assert not tap.attached
    assert not model._forward_hooks


def test_what_nobody_ran_is_run_at_detach_and_at_the_next_step(xla):
    model, x = xla.put(nn.Linear(4, 4)).eval(), torch.ones(2, 4, device=xla.device)
    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        model(x)
        assert not sink.records
        model(x)
        assert {record.at.step for record in sink.records} <= {0}
    assert sink.steps == [0, 1]
    assert sink.coverage["complete"]


def test_two_models_tapped_side_by_side_do_not_disturb_each_other(xla):
    models = [xla.put(nn.Linear(4, 4)).eval() for _ in range(2)]
    x = xla.put(torch.randn(2, 4))
    sinks = [tensortap.MemorySink(), tensortap.MemorySink()]
    taps = [
        tensortap.attach(model, sink, values="full", on_error="raise")
        for model, sink in zip(models, sinks, strict=True)
    ]
    with torch.no_grad():
        for _ in range(2):
            models[1](models[0](x))
    for tap in taps:
        tap.detach()
    for model, sink in zip(models, sinks, strict=True):
        assert len(sink.records) == 2 * 4
        assert sink.coverage["complete"]
        [(_, seen), _] = sink.find("root/forward/input")
        [(_, made), _] = sink.find("root/forward/output")
        assert torch.allclose(made, functional.linear(seen, *(p.cpu() for p in model.parameters())))


def test_random_numbers_and_step_closures_of_the_user_are_left_alone(xla):
    model = xla.put(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))).train()
    x, called = xla.put(torch.randn(4, 8)), []

    def numbers() -> list[torch.Tensor]:
        xla.torch_xla.manual_seed(3)
        with torch.no_grad():
            return [
                value.cpu()
                for _ in range(3)
                for value in (model(x), torch.rand(3, device=x.device))
            ]

    expected = numbers()
    xla.model.add_step_closure(lambda: called.append("now"))
    with tensortap.attach(model, tensortap.MemorySink(), on_error="raise"):
        found = numbers()
    assert all(map(torch.equal, expected, found))
    assert not called
    xla.sync()
    assert called == ["now"]


def test_the_self_check_compares_and_times_whole_steps(xla, capsys):
    result = tensortap.selfcheck(xla.put(nn.Sequential(Block(8))), torch.ones(2, 8).to(xla.device))
    assert result.identical or max(result.ulp.values()) <= 4
    assert result.records > 20
    assert 0 < result.overhead < 1000


def test_a_model_moved_after_it_was_attached_is_told_to_attach_later(xla):
    model = nn.Sequential(nn.Linear(4, 4))
    tap = tensortap.attach(model, tensortap.MemorySink())
    model.to(xla.device)
    with pytest.warns(tensortap.CaptureWarning, match="Attach after moving the model"):
        model(torch.ones(2, 4, device=xla.device))
    tap.detach()


def test_an_evaluation_between_training_steps_runs_once_before_it_is_read(xla):
    model, x = xla.put(nn.Sequential(Block(8))).train(), xla.put(torch.randn(2, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        xla.sync()

    def evaluate():
        with torch.no_grad():
            model(x).cpu()

    sink = tensortap.MemorySink()
    with tensortap.attach(model, sink, on_error="raise"):
        costs = [xla.cost(run).executions for run in (train, evaluate, train, evaluate)]
    assert costs == [1, 1, 1, 1]
    records = [record.at for record, _ in sink.find("root/forward/output")]
    assert [at.eval for at in records] == [False, True, False, True]


def test_processes_that_torch_xla_launched_are_ranks(xla, monkeypatch):
    model = xla.put(nn.Linear(2, 2))
    backend = for_device(xla.device)
    assert backend.place() == (0, 1)
    monkeypatch.setattr(backend._runtime._runtime, "process_index", lambda: 2)
    monkeypatch.setattr(backend._runtime._runtime, "process_count", lambda: 4)
    sink = tensortap.MemorySink()
    with torch.no_grad(), tensortap.attach(model, sink):
        model(torch.ones(1, 2, device=xla.device))
    assert (sink.run.rank, sink.run.world_size) == (2, 4)
    assert {record.at.rank for record in sink.records} == {2}


def test_the_last_step_is_written_at_exit_without_detach_or_synchronisation(xla, tmp_path):
    program = (
        "import torch, torch_xla, tensortap\n"
        "model = torch.nn.Linear(4, 4).to('xla')\n"
        f"tensortap.attach(model, {str(tmp_path / 'run')!r}, values='full')\n"
        "model(torch.ones(2, 4, device='xla')).sum().backward()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tensortap.open_run(tmp_path / "run")
    assert run.coverage()["complete"]
    assert torch.equal(run.tensor("root/grad/bias", step=0), torch.full((4,), 2.0))


def test_versions_of_torch_xla_are_in_the_run(xla):
    model = xla.put(nn.Linear(2, 2))
    sink = tensortap.MemorySink()
    with torch.no_grad(), tensortap.attach(model, sink):
        model(torch.ones(1, 2, device=xla.device))
    assert sink.run.versions["torch_xla"] == xla.torch_xla.__version__
