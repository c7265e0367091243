"""What deferred and lazy backends capture is held, fetched at once, and chosen from then."""

from __future__ import annotations

import pytest
import torch

import tensortap
from tensortap.arena import HostArena
from tensortap.backends import CpuBackend
from tensortap.errors import CaptureError
from tensortap.held import Holder, Item, StepEnd
from tensortap.stats import statistics
from tensortap.testing import example_record


class Late:
    """A reduction or snapshot that has its value once it is collected."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.nbytes, self.fetched = tensor, tensor.nbytes, False

    def host(self) -> torch.Tensor:
        assert self.fetched
        return self.tensor


class FakeLazyBackend(CpuBackend):
    """Counts graphs that were run and transfers, as torch_xla's metrics would."""

    def __init__(self, *, lazy: bool = True) -> None:
        self.lazy = lazy
        self.graphs = self.transfers = 0
        self.forbidden = False
        self.watchers = []

    def watch(self, ran):
        self.watchers.append(ran)

    def run(self):
        if self.forbidden:
            return False
        self.read_by_the_user()
        watchers, self.watchers = self.watchers, []
        for ran in watchers:
            ran()
        return True

    def read_by_the_user(self):
        self.graphs += 1

    def runs(self):
        return self.graphs

    def collect(self, reductions, snapshots):
        self.transfers += 1
        for one in snapshots:
            one.fetched = True
        return [statistics(one.tensor) for one in reductions]


class Ears:
    """A listener that wants even steps only, and remembers what it was told."""

    def __init__(self) -> None:
        self.early, self.dropped, self.failures = [], [], []

    def wants(self, step):
        return step % 2 == 0

    def lost(self, record, reason):
        self.dropped.append((record.seq, reason))

    def read_early(self, between):
        self.early.append(between)

    def failed(self, failure):
        self.failures.append(failure)


class Desk:
    """A holder with all there is around it."""

    def __init__(self, *, limit: int = 1 << 20, lazy: bool = True) -> None:
        self.backend, self.ears, self.out = FakeLazyBackend(lazy=lazy), Ears(), []
        self.arena = HostArena(limit)
        self.holder = Holder(
            self.backend,
            self.arena,
            self.ears,
            put=lambda *items: self.out.extend(items),
            may_wait=lambda: False,
        )

    def add(self, seq: int, *, step: int = 0, payload: Late | None = None) -> Late:
        """Hold one record, with a payload of its own or that of another."""
        tensor = torch.full((512,), float(seq))
        record = example_record(seq, tensor if payload else None, step=step)
        self.holder.add(Item([record], self.backend, Late(tensor), payload))
        return payload or Late(tensor)

    def written(self) -> list[int]:
        return [r.seq for item in self.out if isinstance(item, Item) for r in item.records]


def test_nothing_moves_until_the_graph_has_run_and_then_everything_at_once():
    desk = Desk()
    for seq in range(3):
        desk.add(seq, payload=Late(torch.ones(4)) if seq else None)
    assert desk.holder.end_step(0)
    assert not desk.out
    desk.holder.run()
    assert sorted(desk.written()) == [0, 1, 2]
    assert desk.out[-1] == StepEnd(0)
    assert (desk.backend.graphs, desk.backend.transfers) == (1, 1)
    assert all(record.stats.count == 512 for item in desk.out[:-1] for record in item.records)
    assert not desk.holder.end_step(2), "nothing is held: the end of a step need not wait"


def test_steps_that_are_not_selected_are_dropped_without_a_transfer():
    desk = Desk()
    desk.add(0, step=1)
    desk.holder.end_step(1)
    desk.holder.run()
    assert not desk.out
    assert desk.backend.transfers == 0
    desk.add(1, step=2)
    desk.holder.end_step(2)
    desk.holder.run()
    assert desk.written() == [1]
    assert desk.out[-1] == StepEnd(2)


def test_records_that_share_a_payload_leave_together_and_take_its_room_once():
    desk = Desk()
    shared = Late(torch.ones(4096))
    desk.add(0, payload=shared)
    desk.add(1, step=1, payload=shared)
    desk.add(2, payload=shared)
    desk.holder.run()
    [item] = desk.out
    assert [record.seq for record in item.records] == [0, 2]
    assert desk.arena.used == shared.nbytes


def test_what_does_not_fit_goes_in_transfers_of_its_own_or_is_dropped():
    desk = Desk(limit=2 * 4096)
    for seq in range(3):
        desk.add(seq, payload=Late(torch.ones(1024)))
    desk.holder.run()
    assert desk.backend.graphs == 1
    assert desk.backend.transfers == 2
    assert desk.ears.dropped == [(2, "dropped: max_pending was full")]
    bare = next(item for item in desk.out if item.records[0].seq == 2)
    assert (bare.snapshot, bare.buffer, bare.records[0].values) == (None, None, "stats")
    assert bare.records[0].stats is not None


def test_a_part_of_the_graph_that_ran_by_itself_is_told_with_its_place():
    desk = Desk()
    desk.add(0)
    desk.backend.read_by_the_user()
    desk.add(1)
    desk.holder.run()
    assert len(desk.ears.early) == 1
    desk.add(2)
    desk.backend.read_by_the_user()
    desk.holder.run()
    assert desk.ears.early[1].endswith("and the end of the step")
    desk.backend.read_by_the_user()
    desk.add(3)
    desk.holder.run()
    assert len(desk.ears.early) == 2, "between steps everybody may read"


def test_a_graph_that_may_not_run_keeps_what_is_held_and_is_an_error_at_the_end():
    desk = Desk()
    desk.add(0)
    desk.backend.forbidden = True
    assert not desk.holder.run()
    assert not desk.out
    with pytest.raises(CaptureError, match="Detach after it"):
        desk.holder.finish()
    desk.backend.forbidden = False
    desk.holder.finish()
    assert desk.written() == [0]


def test_a_failing_transfer_is_told_and_does_not_reach_whoever_ran_the_graph():
    desk = Desk()
    desk.add(0)
    desk.backend.collect = lambda *_: 1 / 0
    desk.backend.run()
    assert [type(failure) for failure in desk.ears.failures] == [ZeroDivisionError]


def test_a_deferred_backend_waits_for_the_end_of_the_step_or_until_room_runs_out():
    desk = Desk(limit=2 * 4096, lazy=False)
    desk.add(0, payload=Late(torch.ones(1024)))
    assert not desk.out
    desk.holder.end_step(0)
    assert desk.written() == [0]
    for item in desk.out[:1]:
        desk.arena.give(item.buffer)
    for seq in (1, 2, 3):
        desk.add(seq, payload=Late(torch.ones(1024)))
    assert desk.backend.transfers > 1
    assert desk.backend.graphs == 0


def test_a_failure_to_fetch_at_detach_is_reported(monkeypatch):
    model = torch.nn.Linear(2, 2)
    tap = tensortap.attach(model, sink := tensortap.MemorySink(), on_error="raise")
    model(torch.ones(1, 2))
    monkeypatch.setattr(tap._session.transfer, "_resolve", lambda: 1 / 0)
    with pytest.raises(CaptureError, match="ZeroDivisionError"):
        tap.detach()
    assert sink.closed
    assert not model._forward_hooks
