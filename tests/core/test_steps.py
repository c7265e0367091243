"""Steps, microbatches, calls and recomputation."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from tests.core.models import Inside, Mlp, Stack
from torch import nn
from torch.utils.checkpoint import checkpoint

import tensortap

X = torch.ones(2, 8)


def coordinates(sink, name):
    """(step, microbatch, call, eval, recompute) of each record of a name."""
    return [
        (r.at.step, r.at.microbatch, r.at.call, r.at.eval, r.at.recompute)
        for r, _ in sink.find(name)
    ]


def steps_of(sink, name="root/forward/output"):
    return [found[:2] for found in coordinates(sink, name)]


def tapped(model, **options):
    sink = tensortap.MemorySink()
    return sink, tensortap.attach(model, sink, on_error="raise", **options)


def test_gradient_accumulation_is_microbatches_of_one_step():
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink, tap = tapped(model)
    with tap:
        for _ in range(2):
            for _ in range(3):
                model(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert steps_of(sink) == expected
    assert steps_of(sink, "up/backward/grad_output") == expected
    assert steps_of(sink, "up/grad/weight") == expected
    assert steps_of(sink, "up/param/weight") == [(0, 0), (1, 0)]
    assert sink.steps == [0, 1]


def test_the_last_gradient_of_a_step_is_its_sum():
    model = Mlp()
    sink, tap = tapped(model, values="full", phases=("grad",))
    with tap:
        for _ in range(2):
            model(X).sum().backward()
        accumulated = model.up.weight.grad.clone()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(sink.find("up/grad/weight")[-1][1], accumulated)


def test_a_run_serves_the_sum_of_the_step_as_its_gradient(tmp_path):
    model = Mlp()
    with tensortap.attach(model, tmp_path / "run", values="full", phases=("grad",)):
        model(X).sum().backward()
        model(2 * X).sum().backward()
    run = tensortap.open_run(tmp_path / "run")
    assert torch.equal(run.tensor("up/grad/weight"), model.up.weight.grad)
    first = run.tensor("up/grad/weight", microbatch=0)
    assert not torch.equal(first, model.up.weight.grad)


def test_two_forwards_before_one_backward_are_microbatches():
    model = Mlp()
    sink, tap = tapped(model)
    with tap:
        (model(X) + model(2 * X)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    assert steps_of(sink) == [(0, 0), (0, 1)]
    assert sorted(steps_of(sink, "up/backward/grad_output")) == [(0, 0), (0, 1)]


def test_two_optimizers_end_one_step_together():
    model = Mlp()
    first = torch.optim.SGD(model.up.parameters(), 0.1)
    second = torch.optim.SGD(model.down.parameters(), 0.1)
    sink, tap = tapped(model)
    with tap:
        for _ in range(3):
            model(X).sum().backward()
            first.step()
            second.step()
    assert steps_of(sink) == [(0, 0), (1, 0), (2, 0)]


def test_an_optimizer_of_another_model_ends_no_step():
    model, other = Mlp(), Mlp()
    sink, tap = tapped(model)
    with tap:
        model(X).sum().backward()
        other(X).sum().backward()
        torch.optim.SGD(other.parameters(), 0.1).step()
        model(X).sum().backward()
    assert steps_of(sink) == [(0, 0), (0, 1)]


def test_an_overflow_that_skips_the_optimizer_still_ends_the_step():
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    sink, tap = tapped(model)
    with tap:
        for factor in (1.0, float("inf"), 1.0):
            before = model.up.weight.clone()
            scaler.scale(model(X).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(before, model.up.weight) == (factor == float("inf"))
    assert steps_of(sink) == [(0, 0), (1, 0), (2, 0)]
    assert sink.steps == [0, 1, 2]


def test_evaluation_inside_training_is_marked_and_not_counted():
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink, tap = tapped(model)
    with tap:
        for _ in range(2):
            model(X).sum().backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                model(X)
                model(X)
            model.train()
    training = [found for found in coordinates(sink, "root/forward/output") if not found[3]]
    evaluation = [found for found in coordinates(sink, "root/forward/output") if found[3]]
    assert [found[:2] for found in training] == [(0, 0), (1, 0)]
    assert [found[:2] for found in evaluation] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_without_training_every_forward_is_a_step():
    model = Mlp().eval()
    sink, tap = tapped(model)
    with tap:
        for _ in range(3):
            model(X)
    assert steps_of(sink) == [(0, 0), (1, 0), (2, 0)]
    assert sink.steps == [0, 1, 2]


def test_a_list_of_chunks_shares_its_steps_and_each_has_its_names():
    chunks = [Mlp().eval(), Mlp().eval()]
    sink, tap = tapped(chunks, phases=("forward",))
    with tap:
        for _ in range(2):
            chunks[1](chunks[0](X))
    for chunk in range(2):
        assert steps_of(sink, f"chunks.{chunk}.root/forward/output") == [(0, 0), (1, 0)]
        assert steps_of(sink, f"chunks.{chunk}.up/forward/output") == [(0, 0), (1, 0)]
    assert sink.steps == [0, 1]


def test_only_selected_training_steps_are_captured_backward_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink, tap = tapped(model, steps="1:6:2")
    with tap:
        for _ in range(6):
            model(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in ("0/grad/weight", "0/backward/grad_output", "0/param/weight", "1/forward/output"):
        assert steps_of(sink, name) == [(1, 0), (3, 0), (5, 0)]


@pytest.mark.parametrize("select", ["0/backward/*,*/grad/*", "*/grad/*"])
def test_gradients_belong_to_their_own_step_whatever_is_watched(select):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink, tap = tapped(model, select=select)
    with tap:
        for _ in range(3):
            first, second = model(X).sum(), model(2 * X).sum()
            first.backward()
            second.backward()
            optimizer.step()
            optimizer.zero_grad()
    expected = [(step, microbatch) for step in range(3) for microbatch in range(2)]
    for site in range(3):
        assert steps_of(sink, f"{site}/grad/weight") == expected


def test_reentrant_checkpointing_keeps_to_its_own_step():
    class Checkpointed(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=True)
            return x

    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink, tap = tapped(model, select="layers.0.*", steps="0,2")
    with tap:
        for _ in range(3):
            model(X.clone().requires_grad_()).sum().backward()
            optimizer.step()
    for name in ("layers.0.up/backward/grad_output", "layers.0.up/grad/weight"):
        assert steps_of(sink, name) == [(0, 0), (2, 0)]
    assert steps_of(sink, "layers.0.up/forward/output") == [(0, 0), (0, 0), (2, 0), (2, 0)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_used_twice_in_a_checkpointed_block_keeps_its_call_numbers(reentrant):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.Tanh()

        def forward(self, x):
            return self.act(self.b(self.act(self.a(x))))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.again = self.blocks[0]

        def forward(self, x):
            for block in (*self.blocks, self.again):
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    torch.manual_seed(3)
    model, x = Net(), torch.randn(2, 8, requires_grad=True)
    plain, tap = tapped(model, values="full")
    with tap:
        model(x).sum().backward()
    forward = {
        (record.name, record.at.call): payload
        for record, payload in zip(plain.records, plain.payloads, strict=True)
        if record.name.phase == "forward" and not record.at.recompute
    }
    again = [
        (record.name, record.at.call, payload)
        for record, payload in zip(plain.records, plain.payloads, strict=True)
        if record.at.recompute
    ]
    assert {(str(name), call) for name, call, _ in again} >= {
        (f"blocks.{block}.act/forward/input", call) for block in range(2) for call in range(2)
    }
    for name, call, payload in again:
        assert torch.equal(payload, forward[name, call]), (name, call)
    calls = [record.at.call for record, _ in plain.find("blocks.0.act/backward/grad_input")]
    assert sorted(calls) == [0, 1, 2, 3]


def test_a_forward_that_raised_does_not_lend_its_step_to_a_later_one():
    def sometimes(x):
        if x.sum() < 0:
            raise ValueError("no")
        return x

    model = nn.Sequential(nn.Identity(), Inside(sometimes)).eval()
    sink, tap = tapped(model, steps="0", phases=("forward",))
    with tap:
        with pytest.raises(ValueError, match="no"):
            model(-X)
        model(X)
    assert sink.find("1/forward/output") == []
    assert torch.equal(model[1](X), X)


def test_an_interrupt_does_not_freeze_the_steps():
    def interrupted(x):
        if x.sum() < 0:
            raise KeyboardInterrupt
        return x

    model = nn.Sequential(nn.Identity(), Inside(interrupted)).eval()
    sink, tap = tapped(model, phases=("forward",))
    with tap:
        with pytest.raises(KeyboardInterrupt):
            model(-X)
        for _ in range(2):
            model(X)
    assert coordinates(sink, "1/forward/output") == [
        (1, 0, 0, False, False),
        (2, 0, 0, False, False),
    ]


def test_training_after_a_first_inference_begins_its_own_step():
    model = Mlp()
    sink, tap = tapped(model, phases=("forward",))
    with tap:
        tap.record("before.all/forward/x", X)
        with torch.no_grad():
            model(X)
        model(X).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        model(X)
    assert steps_of(sink) == [(0, 0), (1, 0), (2, 0)]


def test_a_leaf_input_gets_the_gradient_of_each_forward_once():
    model, x = Mlp(), X.clone().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink, tap = tapped(model, values="full", phases=("backward",))
    expected = []
    with tap:
        for _ in range(2):
            for factor in (1, 2):
                x.grad = None
                (factor * model(x).sum()).backward()
                expected.append(x.grad)
            optimizer.step()
    assert steps_of(sink, "root/backward/grad_input") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (_, payload), gradient in zip(sink.find("root/backward/grad_input"), expected, strict=True):
        assert torch.equal(payload, gradient)
    assert x._backward_hooks is None


def test_only_selected_steps_are_captured():
    model = Mlp().eval()
    sink, tap = tapped(model, steps="1:6:2")
    with tap:
        for _ in range(6):
            model(X)
    assert sorted({record.at.step for record in sink.records}) == [1, 3, 5]
    assert sink.steps == [1, 3, 5]


def test_after_tap_step_only_the_user_ends_steps():
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sink, tap = tapped(model)
    with tap:
        for _ in range(2):
            for _ in range(2):
                model(X).sum().backward()
                optimizer.step()
            tap.step()
    assert steps_of(sink)[-2:] == [(sink.steps[-1], 0), (sink.steps[-1], 1)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_recomputation_not_a_second_call(reentrant):
    class Checkpointed(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant)
            return x

    torch.manual_seed(0)
    model = Checkpointed()
    x = torch.randn(2, 8, requires_grad=True)
    sink, tap = tapped(model, values="full")
    with tap:
        for _ in range(2):
            model(x).sum().backward()
    for step, microbatch in ((0, 0), (0, 1)):
        for name in ("layers.0.up/forward/output", "layers.1.up/forward/output"):
            found = [
                (record.at.call, record.at.recompute, payload)
                for record, payload in sink.find(name)
                if (record.at.step, record.at.microbatch) == (step, microbatch)
            ]
            assert [item[:2] for item in found] == [(0, False), (0, True)]
            assert torch.equal(found[0][2], found[1][2])
    gradients = coordinates(sink, "layers.0.up/backward/grad_output")
    assert gradients == [(0, 0, 0, False, False), (0, 1, 0, False, False)]


def test_calls_recomputed_in_reverse_get_the_numbers_of_their_originals():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Mlp()

        def forward(self, x):
            x = checkpoint(self.block, x, use_reentrant=False)
            return checkpoint(self.block, x, use_reentrant=False)

    model = Twice()
    sink, tap = tapped(model, values="full")
    with tap:
        model(torch.randn(2, 8)).sum().backward()
    found = {
        (record.at.call, record.at.recompute): payload
        for record, payload in sink.find("block.up/forward/input")
    }
    assert set(found) == {(0, False), (1, False), (0, True), (1, True)}
    for call in (0, 1):
        assert torch.equal(found[call, False], found[call, True])


def test_threads_have_their_own_microbatches():
    model = Mlp().train()
    sink, tap = tapped(model, values="full", phases=("forward",))
    barrier = threading.Barrier(4)

    def work(value):
        barrier.wait()
        for _ in range(5):
            model(torch.full((2, 8), float(value)))

    with tap:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    inputs = {(r.at.step, r.at.microbatch): p for r, p in sink.find("root/forward/input")}
    assert sorted(inputs) == [(0, n) for n in range(20)]
    for record, payload in sink.find("up/forward/input"):
        assert torch.equal(payload, inputs[record.at.step, record.at.microbatch])


def test_replicas_of_data_parallel_are_tapped():
    model = Mlp()
    sink, tap = tapped(model, phases=("forward",))
    with tap:
        replica = model._replicate_for_data_parallel()
        replica.up, replica.act, replica.down = (
            child._replicate_for_data_parallel() for child in model.children()
        )
        for module in (replica.up, replica.down):
            module.weight, module.bias = torch.ones(1, 1), None
        replica.up.weight, replica.down.weight = model.up.weight * 2, model.down.weight * 2
        replica(X)
    assert "up/forward/output" in sink.names()


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "1 / 0"])
def test_the_last_step_is_flushed_at_exit_without_detach(tmp_path, ending):
    script = f"""
        import torch, tensortap
        model = torch.nn.Linear(4, 4)
        tap = tensortap.attach(model, {str(tmp_path / "run")!r}, values="full")
        model(torch.ones(2, 4)).sum().backward()
        {ending}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=120)
    run = tensortap.open_run(tmp_path / "run")
    assert run.complete
    assert torch.equal(run.tensor("root/forward/input"), torch.ones(2, 4))
