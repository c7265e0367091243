"""How NxD's parallel layers lie over ranks, read off their attributes.

The pieces of four ranks are put together by numpy, from nothing but their placements.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from tests.neuron.traced import fake_nxd
from tests.neuron.traced.fake_nxd import (
    ColumnParallelLinear,
    FakeGroup,
    ParallelEmbedding,
    RowParallelLinear,
)
from torch import nn

from tensortap_neuron.traced.layers import (
    Group,
    Lies,
    all_lies,
    kind,
    lies_of,
    place,
    weight_placement,
)

RANKS = 4


@pytest.fixture(autouse=True)
def nxd(monkeypatch):
    fake_nxd.install(monkeypatch)


def spread(make, whole):
    """The layer of every rank, each with its piece of the whole weight."""
    layers = [make(FakeGroup(RANKS, rank)) for rank in range(RANKS)]
    for layer in layers:
        layer.load(whole)
    return layers


def joined(pieces):
    """numpy: pieces laid down where their placements say, summands added."""
    first = pieces[0][1]
    out = np.zeros(first.logical_shape)
    for piece, found in pieces:
        index = [np.arange(size) for size in found.logical_shape]
        for axis, held in found.segments.items():
            index[axis] = np.concatenate([np.arange(a, a + n) for a, n in held])
        values = piece.detach().double().numpy()
        out[np.ix_(*index)] = out[np.ix_(*index)] + values if found.partial else values
    return out[tuple(slice(first.valid.get(axis)) for axis in range(out.ndim))]


def rank_of(layer):
    group = getattr(layer, "tensor_parallel_group", None) or layer.tensor_model_parallel_group
    return Group(RANKS, group.rank())


def outputs(layers, values):
    """Each rank's output, and how it lies."""
    for layer, value in zip(layers, values, strict=True):
        out, lies = layer(value), lies_of(layer)
        shape = tuple(out.shape)
        pad, stride = lies.output_pad, lies.stride
        yield out, place(lies.output, shape, rank_of(layer), lies, pad=pad, stride=stride)


def inputs(layers, values):
    for layer, value in zip(layers, values, strict=True):
        lies = lies_of(layer)
        shape = tuple(value.shape)
        yield value, place(lies.input, shape, rank_of(layer), lies, pad=lies.input_pad)


def parameters(layers, word="weight"):
    for layer in layers:
        value = getattr(layer, word)
        yield value, weight_placement(layer, word, tuple(value.shape), rank_of(layer))


def product(value, weight):
    return value.double().numpy() @ weight.double().numpy().T


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "stride"), [(8, 1), (16, 2), (10, 1)])
def test_a_column_that_is_not_gathered_is_a_piece_of_the_last_axis(width, stride):
    whole, value = torch.randn(width, 6), torch.randn(2, 3, 6)
    options = {"gather_output": False, "stride": stride, "pad": True}
    layers = spread(lambda group: ColumnParallelLinear(6, width, **options, group=group), whole)
    close(joined(list(outputs(layers, [value] * RANKS))), product(value, whole))
    np.testing.assert_array_equal(joined(list(parameters(layers))), whole.numpy())


@pytest.mark.parametrize("width", [8, 10])
def test_a_row_that_is_not_reduced_is_a_summand(width):
    whole, value = torch.randn(5, width), torch.randn(2, width)
    options = {"reduce_output": False, "pad": True}
    layers = spread(lambda group: RowParallelLinear(width, 5, **options, group=group), whole)
    pieces = nn.functional.pad(value, (0, layers[0].pad_size)).chunk(RANKS, -1)
    close(joined(list(outputs(layers, pieces))), product(value, whole))
    np.testing.assert_array_equal(joined(list(inputs(layers, pieces))), value.numpy())
    np.testing.assert_array_equal(joined(list(parameters(layers))), whole.numpy())


@pytest.mark.parametrize("across", [True, False])
def test_an_embedding_that_does_not_collect_is_a_piece_or_a_summand(across):
    width = 8 if across else 6  # NxD fails on a padded piece that is not collected.
    whole, ids = torch.randn(10, width), torch.tensor([[0, 9, 3]])
    options = {"shard_across_embedding": across, "collect_output": False, "pad": True}
    layers = spread(lambda group: ParallelEmbedding(10, width, **options, group=group), whole)
    found = joined(list(outputs(layers, [ids] * RANKS)))
    np.testing.assert_array_equal(found, whole.double().numpy()[ids.numpy()])
    np.testing.assert_array_equal(joined(list(parameters(layers))), whole.numpy())


GROUP = FakeGroup(RANKS, 1)
ALONG = {"sequence_parallel_enabled": True, "sequence_dimension": 1}
SUMMAND = {"bias": True, "reduce_output": False}


def column(**options):
    return ColumnParallelLinear(4, 6 if options.get("pad") else 8, group=GROUP, **options)


def row(**options):
    return RowParallelLinear(8, 4, group=GROUP, **options)


def embedding(**options):
    return ParallelEmbedding(8, 4, group=GROUP, **options)


@pytest.mark.parametrize(
    ("layer", "lies"),
    [
        (column(), Lies("whole", "whole", 0)),
        (column(pad=True), Lies("whole", "whole", 0)),
        (column(pad=True, keep_padded_output=True), Lies("whole", "whole", 0, output_pad=2)),
        (column(gather_output=False, **ALONG), Lies("last", "sequence", 1)),
        (row(), Lies("whole", "last", 0)),
        (row(input_is_parallel=False), Lies("whole", "whole", 0)),
        (row(**ALONG), Lies("sequence", "last", 1)),
        # Each rank adds the bias to its summand: the sum would have it four times.
        (row(**SUMMAND), Lies("unknown", "last", 0)),
        (row(**SUMMAND, skip_bias_add=True), Lies("sum", "last", 0)),
        (row(rank_ordering=[3, 2, 1, 0]), Lies()),
        (embedding(), Lies("whole", "whole")),
        (embedding(shard_across_embedding=True), Lies("whole", "whole")),
        (embedding(sequence_parallel_enabled=True), Lies("first", "whole")),
        (embedding(**ALONG), Lies("sum", "whole")),
    ],
)
def test_what_is_gathered_summed_or_scattered_is_read_off_the_attributes(layer, lies):
    assert lies_of(layer) == lies


def test_other_modules_are_no_parallel_layers_and_lie_as_their_neighbours_do():
    assert kind(nn.Linear(2, 2)) is None
    gate = column(gather_output=False, pad=True)
    mlp = nn.ModuleDict({"gate_proj": gate, "act_fn": nn.SiLU(), "norm": nn.LayerNorm(4)})
    lies = all_lies(mlp)
    assert lies[mlp["act_fn"]] == Lies("last", "last", 0, 2, 2)
    assert mlp["norm"] not in lies


def test_a_bias_is_cut_where_the_output_is():
    [(_, cut)] = parameters([column(bias=True, gather_output=False)], "bias")
    assert cut.segments == {0: ((2, 2),)}
    assert [found for _, found in parameters([column(bias=True), row(bias=True)], "bias")] == [
        None
    ] * 2
    [(_, unknown)] = parameters([row(rank_ordering=[0])])
    assert unknown.unknown


def test_without_nxd_nothing_is_a_parallel_layer(monkeypatch):
    monkeypatch.delitem(sys.modules, "neuronx_distributed.parallel_layers.layers")
    assert kind(column()) is None
