"""Bounded memory, failing sinks, and what happens to the training run."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.core.models import Stack
from torch import nn

import tensortap
from tensortap.arena import HostArena

X = torch.randn(64, 8)


class Slow(tensortap.MemorySink):
    """Takes its time, so that payloads pile up."""

    def write(self, record, payload):
        time.sleep(0.002)
        super().write(record, payload)


class Failing(tensortap.MemorySink):
    """Fails at the n-th record."""

    def __init__(self, after=3):
        super().__init__()
        self.after = after

    def write(self, record, payload):
        if len(self.records) == self.after:
            raise OSError(28, "No space left on device")
        super().write(record, payload)


def test_payloads_in_flight_stay_within_max_pending():
    model = Stack(depth=6).eval()
    sink = Slow()
    with tensortap.attach(model, sink, values="full", max_pending="32KiB", on_error="raise") as tap:
        for _ in range(3):
            model(X)
        arena = tap._session.transfer.arena
        assert 0 < arena.peak <= 32 * 1024
    assert sink.coverage["complete"]
    assert all(payload is not None for payload in sink.payloads)


def test_dropping_instead_of_waiting_is_counted_as_gaps():
    model = Stack(depth=6).eval()
    sink = Slow()
    options = {"values": "full", "max_pending": "12KiB", "on_full": "drop", "phases": ("forward",)}
    with tensortap.attach(model, sink, **options):
        for _ in range(3):
            model(X)
    dropped = sum(row["count"] for row in sink.coverage["gaps"])
    assert dropped > 0
    everything = tensortap.MemorySink()
    with tensortap.attach(model, everything, phases=("forward",)):
        for _ in range(3):
            model(X)
    assert len(sink.records) == len(everything.records)
    assert dropped == sink.payloads.count(None)
    assert all(record.stats is not None for record in sink.records)
    assert not sink.coverage["complete"]


def test_a_tensor_larger_than_the_budget_is_still_written():
    x = torch.randn(100_000)
    sink = tensortap.MemorySink()
    with tensortap.attach(nn.Identity(), sink, values="full", max_pending="64KiB") as tap:
        tap.record("big/forward/x", x)
        tap.record("strided/forward/x", x[::2])
    assert torch.equal(sink.find("big/forward/x")[0][1], x)
    [gap] = sink.coverage["gaps"]
    assert gap["name"] == "strided/forward/x"
    assert "raise it" in gap["reason"]


def test_a_failing_sink_does_not_kill_the_training_run():
    model = Stack()
    sink = Failing()
    with pytest.warns(tensortap.CaptureWarning, match="No space left on device") as caught:
        with tensortap.attach(model, sink, values="full"):
            for _ in range(20):
                model(X).sum().backward()
                time.sleep(0.002)
    assert len([w for w in caught if w.category is tensortap.CaptureWarning]) == 1
    assert len(sink.records) == 3
    assert not sink.coverage["complete"]
    assert "No space left" in sink.coverage["gaps"][0]["reason"]
    assert sink.closed


def test_a_failing_sink_raises_when_asked_to():
    model = Stack()
    with pytest.raises(tensortap.CaptureError, match="No space left on device"):
        with tensortap.attach(model, Failing(), values="full", on_error="raise"):
            for _ in range(50):
                model(X)
                time.sleep(0.002)
    assert not model._forward_hooks


def test_waiting_for_room_ends_when_the_sink_fails():
    model = Stack(depth=4)
    done = threading.Event()

    def work():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with tensortap.attach(model, Failing(2), values="full", max_pending="8KiB"):
                for _ in range(5):
                    model(X)
        done.set()

    threading.Thread(target=work, daemon=True).start()
    assert done.wait(30)


def test_a_broken_hook_stops_the_capture_and_not_the_model(monkeypatch):
    model = Stack()
    sink = tensortap.MemorySink()
    tap = tensortap.attach(model, sink)
    expected = model.eval()(X)
    monkeypatch.setattr(tap._session.capture, "_emit", lambda *_: 1 / 0)
    with pytest.warns(tensortap.CaptureWarning, match="ZeroDivisionError"):
        found = model(X)
    tap.detach()
    assert torch.equal(found, expected)
    assert not sink.coverage["complete"]


def test_an_error_on_its_way_out_is_not_hidden_by_the_tap():
    def work():
        with tensortap.attach(nn.Identity(), tensortap.MemorySink()):
            raise KeyError("mine")

    with pytest.warns(tensortap.CaptureWarning, match="captured nothing"), pytest.raises(KeyError):
        work()


@given(st.lists(st.tuples(st.integers(0, 30_000), st.booleans()), max_size=60))
def test_pieces_of_the_arena_never_overlap_and_all_come_back(requests):
    arena, held = HostArena(64 << 10), []
    for number, (nbytes, give_first) in enumerate(requests):
        if held and give_first:
            piece, mark = held.pop(0)
            assert bool((piece == mark).all())
            arena.give(piece)
        piece = arena.take(nbytes, wait=lambda: False)
        if piece is not None:
            assert piece.nbytes >= nbytes
            held.append((piece.fill_(number % 256), number % 256))
        assert arena.used == sum(piece.nbytes for piece, _ in held) <= arena.limit
    for piece, mark in held:
        assert bool((piece == mark).all())
        arena.give(piece)
    assert arena.used == 0
    assert arena.take(arena.limit, wait=lambda: False) is not None
