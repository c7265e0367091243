"""Logical tensors that are put together box by box."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import tensortap
from tensortap import Part, Placement, RunDirectorySink, RunInfo
from tensortap.errors import RunError
from tensortap.names import TensorName
from tensortap.store.query import Which
from tensortap.testing import example_record

NAME = "layers.0.mlp.down/forward/output"


def write(path, pieces):
    """`pieces`: rank -> (tensor, placement); two tensor-parallel ranks."""
    for rank, (tensor, placement) in pieces.items():
        sink = RunDirectorySink(path)
        parallel = {"tp": len(pieces), "tp_rank": rank}
        sink.open(RunInfo("launch", "", rank=rank, world_size=len(pieces), parallel=parallel))
        record = example_record(0, tensor)
        at = replace(record.at, rank=rank)
        sink.write(replace(record, at=at, placement=placement), tensor)
        sink.end_step(0)
        sink.close()
    return tensortap.open_run(path)


def boxes(shape):
    edges = [[(0, n), (0, n // 2), (n // 3, n), (n // 2, n // 2 + 1)] for n in shape]
    return itertools.product(*edges)


def require_boxes(run, name=NAME, **chosen):
    whole, logical = run.tensor(name, **chosen), run.logical(name, Which(**chosen))
    assert logical.shape == tuple(whole.shape)
    for box in boxes(whole.shape):
        assert torch.equal(logical.read(box), whole[tuple(slice(*edges) for edges in box)]), box


def test_interleaved_pieces_on_two_axes(tmp_path):
    x = torch.arange(96.0).reshape(12, 8)
    rows = [((0, 3), (6, 3)), ((3, 3), (9, 3))]
    pieces = {
        rank: (
            torch.cat([x[start : start + length] for start, length in runs]),
            Placement((12, 8), {0: runs}),
        )
        for rank, runs in enumerate(rows)
    }
    require_boxes(write(tmp_path / "run", pieces))


def test_parts_of_a_fused_tensor_and_padding(tmp_path):
    x = torch.arange(96.0).reshape(12, 8)
    parts = (Part("layers.0.mlp.up", 0, ((2, 2), (8, 3))),)
    pieces = {
        rank: (
            x[6 * rank : 6 * rank + 6],
            Placement((12, 8), {0: ((6 * rank, 6),)}, {1: 5}, parts=parts),
        )
        for rank in (0, 1)
    }
    run = write(tmp_path / "run", pieces)
    part = str(TensorName("layers.0.mlp.up", "forward", "output"))
    require_boxes(run, part)
    require_boxes(run, part, padded=False)
    require_boxes(run, padded=False)
    assert run.logical(part, Which(padded=False)).shape == (5, 5)


def test_sums_over_ranks_and_replicas(tmp_path):
    pieces = {rank: (torch.full((4, 6), 1.5 + rank), Placement(partial=("tp",))) for rank in (0, 1)}
    require_boxes(write(tmp_path / "sums", pieces))
    pieces = {rank: (torch.arange(24.0).reshape(4, 6), None) for rank in (0, 1)}
    require_boxes(write(tmp_path / "replicas", pieces))


def test_a_box_that_nobody_holds_is_said(tmp_path):
    placement = Placement((8, 6), {0: ((0, 4),)})
    run = write(tmp_path / "run", {0: (torch.ones(4, 6), placement)})
    assert run.logical(NAME).read([(0, 2), (0, 6)]).shape == (2, 6)
    with pytest.raises(RunError, match=r"nothing was captured of \[4:8, 0:6\]"):
        run.logical(NAME).read([(4, 8), (0, 6)])


def test_one_rank_alone_and_a_piece_nobody_can_place(tmp_path):
    pieces = {rank: (torch.full((4, 6), float(rank)), Placement(unknown=True)) for rank in (0, 1)}
    run = write(tmp_path / "run", pieces)
    require_boxes(run, rank=1)
