"""Quantised layers over two tensor-parallel ranks, real processes, against one rank."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.megatron import quantize_layers as built

ROOT = Path(__file__).parents[2]
SHARDED = {"column": {"y": 2, "dweight": 0, "dbias": 0}, "row": {"dx": 2, "dweight": 1}}
"""Axis along which the ranks' pieces of a result lie side by side."""
FORMATS = ("none", "mxfp4", "mxfp8", "nvfp4", "hifp8", "int8")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["tensor", "sequence"])
def two_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], bool]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.megatron.quantize_layers", str(folder), *FORMATS]
    if request.param:
        command.append("--sequence-parallel")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)], request.param


def assembled(pieces: list[Any], layer: str, key: str, sequence_parallel: bool) -> Any:
    """One tensor out of the two ranks'."""
    first, second = (piece[layer][key] for piece in pieces)
    if first is None or second is None:
        return first if second is None else second
    axes = dict(SHARDED.get(layer, SHARDED["column"]))
    if sequence_parallel:
        axes |= {"y": 0} if layer == "row" else {"dx": 0}
        if layer == "row" and key == "dbias":
            return first + second  # Each rank saw its part of the sequence.
    if key in axes:
        return torch.cat([first, second], axes[key])
    assert torch.equal(first, second), f"{layer} {key} differs between ranks"
    return first


@pytest.mark.parametrize("layer", built.LAYERS)
@pytest.mark.parametrize("format", ["none", "mxfp4", "mxfp8", "hifp8"])
def test_two_ranks_compute_what_one_does_where_shards_are_multiples_of_the_block(
    two_ranks: tuple[list[Any], bool], format: str, layer: str
) -> None:
    results, sequence_parallel = two_ranks
    alone = built.run_layers(None if format == "none" else format)[layer]
    for key, wanted in alone.items():
        found = assembled([r[format] for r in results], layer, key, sequence_parallel)
        assert (found is None) == (wanted is None), key
        if wanted is not None:
            error = (found - wanted).abs().max() / wanted.abs().max()
            assert error < 1e-13, f"{key}: {error}"


@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_a_scale_of_the_whole_tensor_is_the_shards_own(
    two_ranks: tuple[list[Any], bool], format: str
) -> None:
    results, sequence_parallel = two_ranks
    alone = built.run_layers(format)["row"]["y"]
    exact = built.run_layers(None)["row"]["y"]
    found = assembled([r[format] for r in results], "row", "y", sequence_parallel)
    assert not torch.equal(found, alone)
    assert (found - exact).norm() < 1.5 * (alone - exact).norm()
