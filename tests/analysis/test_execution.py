"""The order in which the tensors of a run came about, also over the stages of a pipeline."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture_plain, noisy_output
from tests.core.store.building import info, record, write_run

from tensortap import open_run
from tensortap.records import RunInfo
from tensortap.store import RunDirectorySink
from tensortap_analysis import compare
from tensortap_analysis.captured.moments import captured, catalogue

STRETCHES = {"two stages": ([0, 1, 2], [3, 4, 5]), "interleaved": ([0, 2, 4], [1, 3, 5])}


def spread(source, path, stages):
    """A run of one process as if its layers had been on the stages of a pipeline."""
    sinks = []
    for rank in range(len(stages)):
        sinks.append(RunDirectorySink(path))
        place = {"pp": len(stages), "pp_rank": rank}
        sinks[-1].open(RunInfo("launch", "", rank=rank, world_size=len(stages), parallel=place))
    counts = [0] * len(stages)
    with open_run(source) as run:
        for known in run.records():
            rank = stage_of(known, stages)
            tensor = run.piece(known).clone()
            at = dataclasses.replace(known.at, rank=rank)
            moved = dataclasses.replace(known, at=at, seq=counts[rank], payload=None)
            sinks[rank].write(moved, tensor)
            counts[rank] += 1
    for sink in sinks:
        sink.end_step(0)
        sink.close()
    return path


def stage_of(known, stages):
    words = known.name.module.split(".")
    if words[0] == "layers":
        return next(rank for rank, layers in enumerate(stages) if int(words[1]) in layers)
    return 0 if known.name.module == "root" and "input" in known.name.tensor else len(stages) - 1


def names_in_order(path):
    with open_run(path) as run:
        return [moment.name for moment in catalogue(run).moments]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return PlainMlp(depth=6)


@pytest.mark.parametrize("stages", STRETCHES.values(), ids=STRETCHES)
def test_stages_of_a_pipeline_follow_each_other_forward_and_backward(tmp_path, model, stages):
    whole = capture_plain(model, tmp_path / "whole")
    order = names_in_order(whole)
    spread_order = names_in_order(spread(whole, tmp_path / "spread", stages))
    # The gradients of a layer's input and of the output before it are one tensor: either is first.
    inner = [name for name in order if re.match(r"layers\.\d\..*ward", name)]
    assert [name for name in spread_order if name in inner] == inner
    assert sorted(spread_order) == sorted(order)
    assert spread_order.index("root/forward/input") < spread_order.index(inner[0])
    output = spread_order.index("head/forward/output")
    assert spread_order.index("layers.5/forward/output") < output
    assert output < spread_order.index("layers.5/backward/grad_output")


@pytest.mark.parametrize("stages", STRETCHES.values(), ids=STRETCHES)
def test_an_error_in_an_early_stage_is_the_first_divergence(tmp_path, model, stages):
    ref = capture_plain(model, tmp_path / "ref")
    bad = capture_plain(model, tmp_path / "bad", broken=[noisy_output("layers.1.down", 0.3)])
    spread_ref = spread(ref, tmp_path / "spread_ref", stages)
    spread_bad = spread(bad, tmp_path / "spread_bad", stages)
    for one, other in ((spread_ref, bad), (ref, spread_bad), (spread_ref, spread_bad)):
        first = compare(one, other).runs[0].first_divergence
        assert (first.name, first.origin) == ("layers.1.down/forward/output", "local")


def test_microbatches_that_a_pipeline_interleaves_follow_each_other(tmp_path):
    for rank, batches in enumerate(([0, 1], [0, 1])):
        ways = [*((mb, "forward/output") for mb in batches)]
        ways += [(mb, "backward/grad_output") for mb in batches]
        items = [
            (record(f"layers.{rank}/{way}", None, seq, rank=rank, microbatch=mb), None)
            for seq, (mb, way) in enumerate(ways)
        ]
        place = {"pp": 2, "pp_rank": rank}
        write_run(tmp_path / "run", items, info(rank=rank, world_size=2, parallel=place))
    with open_run(tmp_path / "run") as run:
        seen = [(tensor.moment.microbatch, tensor.name) for tensor in captured(run)]
    one = ["layers.0/forward/output", "layers.1/forward/output",
           "layers.1/backward/grad_output", "layers.0/backward/grad_output"]  # fmt: skip
    assert seen == [(mb, name) for mb in (0, 1) for name in one]


def test_layers_that_run_again_for_the_next_token_follow_the_first_time(tmp_path):
    for rank in (0, 1):
        items = [
            (record(f"layers.{layer}/forward/output", None, seq, rank=rank, call=call), None)
            for seq, (call, layer) in enumerate(
                (call, layer) for call in (0, 1) for layer in (2 * rank, 2 * rank + 1)
            )
        ]
        place = {"pp": 2, "pp_rank": rank}
        write_run(tmp_path / "run", items, info(rank=rank, world_size=2, parallel=place))
    with open_run(tmp_path / "run") as run:
        seen = [(t.moment.call, int(t.name.split("/")[0][-1])) for t in captured(run)]
    assert seen == [(call, layer) for call in (0, 1) for layer in range(4)]


def test_what_is_recomputed_comes_after_the_forward_and_before_the_backward(tmp_path):
    ways = [("forward/output", {}), ("forward/output", {"recompute": True}),
            ("backward/grad_output", {})]  # fmt: skip
    for rank in (0, 1):
        items = [
            (record(f"layers.{rank}/{way}", None, seq, rank=rank, **more), None)
            for seq, (way, more) in enumerate(ways)
        ]
        place = {"pp": 2, "pp_rank": rank}
        write_run(tmp_path / "run", items, info(rank=rank, world_size=2, parallel=place))
    with open_run(tmp_path / "run") as run:
        seen = [(t.name.split("/")[0][-1], t.name[-3:], t.moment.recompute) for t in captured(run)]
    assert seen == [
        ("0", "put", False), ("1", "put", False), ("0", "put", True), ("1", "put", True),
        ("1", "put", False), ("0", "put", False),
    ]  # fmt: skip
