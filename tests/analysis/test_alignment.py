"""Axes of two tensors in one order, and boxes of bounded size that cover them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tensortap_analysis.pairs.alignment import Alignment, align


def read(tensor):
    """A stored tensor, read by boxes; remembers how much was read at once."""

    def box_of(box):
        box_of.most = max(box_of.most, math.prod(stop - start for start, stop in box))
        return tensor[tuple(slice(*edges) for edges in box)]

    box_of.most = 0
    return box_of


def whole(side, tensor, aligned, elements=10**9):
    """All blocks of one side, put together in the common order."""
    parts = [side.read(read(tensor), box).reshape(-1) for box in aligned.boxes(elements)]
    return torch.cat(parts).reshape(aligned.shape)


def test_batch_first_and_sequence_first_are_permuted():
    x = torch.randn(2, 5, 3)
    found = align((2, 5, 3), "batch seq hidden", (5, 2, 3), "seq batch hidden")
    assert isinstance(found, Alignment)
    assert found.shape == (2, 5, 3)
    assert torch.equal(whole(found.other, x.transpose(0, 1), found), x)
    assert torch.equal(whole(found.ref, x, found), x)


def test_a_composite_axis_is_split_where_the_other_side_has_its_parts():
    x = torch.randn(2, 4, 5, 3)  # batch head seq dim
    stored = x.permute(2, 0, 1, 3).reshape(5, 2, 12)
    found = align((2, 4, 5, 3), "batch head seq dim", (5, 2, 12), "seq batch (head dim)")
    assert found.shape == (2, 4, 5, 3)
    assert torch.equal(whole(found.other, stored, found), x)
    back = align((5, 2, 12), "seq batch (head dim)", (2, 4, 5, 3), "batch head seq dim")
    assert back.shape == (5, 2, 4, 3)
    assert torch.equal(whole(back.other, x, back), x.permute(2, 0, 1, 3))


def test_a_composite_axis_that_both_have_stays_whole():
    found = align((2, 5, 12), "batch seq (head dim)", (5, 2, 12), "seq batch (head dim)")
    assert found.shape == (2, 5, 12)


def test_tokens_folded_into_one_axis_meet_batch_and_sequence():
    x = torch.randn(2, 5, 3)  # batch seq expert
    folded = x.transpose(0, 1).reshape(10, 3)
    found = align((2, 5, 3), "batch seq expert", (10, 3), "(seq batch) expert")
    for elements in (1, 4, 7, 100):
        assert torch.equal(whole(found.other, folded, found, elements), x)


def test_conv1d_weights_are_transposed():
    weight = torch.randn(3, 4)
    found = align((3, 4), "out in", (4, 3), "in out")
    assert torch.equal(whole(found.other, weight.t(), found), weight)


def test_one_axis_under_two_names_is_taken_for_the_same_and_said():
    found = align((2, 5, 12), "batch seq hidden", (5, 2, 12), "seq batch (head dim)")
    assert found.shape == (2, 5, 12)
    assert found.note == "axes 'hidden' and '(head dim)', taken as equal"
    x = torch.randn(2, 5, 12)
    assert torch.equal(whole(found.other, x.transpose(0, 1), found), x)


@pytest.mark.parametrize(
    ("dims", "note"),
    [(None, "only one side names its axes"), ("rows columns", "'rows columns', taken as equal"),
     ("a b c", "taken as equal")],
)  # fmt: skip
def test_without_matching_names_equal_shapes_are_taken_as_they_are_and_it_is_said(dims, note):
    found = align((2, 5), "batch seq", (2, 5), dims)
    assert found.shape == (2, 5)
    assert not found.moves
    assert note in found.note
    assert align((2, 5), None, (2, 5), None).note is None


def test_a_place_in_the_common_axes_is_one_in_the_stored_tensor():
    x = torch.arange(5 * 2 * 12).reshape(5, 2, 12)
    found = align((5, 2, 12), "seq batch (head dim)", (2, 3, 5, 4), "batch head seq dim")
    common = whole(found.ref, x, found)
    assert common.shape == (5, 2, 3, 4)
    for place in itertools.product(*map(range, common.shape)):
        assert x[found.ref.place(place)] == common[place]


@pytest.mark.parametrize(
    ("shape", "dims", "other", "other_dims"),
    [
        ((2, 5, 3), "batch seq hidden", (5, 2, 4), "seq batch hidden"),
        ((2, 5), None, (5, 2), None),
        ((2, 12), "batch (head dim)", (2, 5, 3), "batch head dim"),
        ((), None, (1,), None),
    ],
)
def test_shapes_that_do_not_fit_are_named(shape, dims, other, other_dims):
    reason = align(shape, dims, other, other_dims)
    assert isinstance(reason, str)
    assert "do not match" in reason
    assert ("x".join(map(str, shape)) or "scalar") in reason


@given(st.permutations(["a", "b", "c", "d"]), st.integers(1, 3), st.integers(1, 40), st.data())
def test_any_order_and_folding_gives_the_same_values_in_bounded_blocks(order, folded, room, data):
    sizes = {name: data.draw(st.integers(1, 4), name) for name in "abcd"}
    x = torch.arange(math.prod(sizes.values())).reshape([sizes[name] for name in "abcd"])
    stored = x.permute(["abcd".index(name) for name in order])
    shape = [sizes[name] for name in order]
    start = data.draw(st.integers(0, 4 - folded))
    inside = order[start : start + folded]
    axes = [*order[:start], f"({' '.join(inside)})", *order[start + folded :]]
    if folded == 1:
        axes = list(order)
    else:
        shape = [*shape[:start], math.prod(shape[start : start + folded]), *shape[start + folded :]]
    found = align(x.shape, "a b c d", shape, " ".join(axes))
    assert isinstance(found, Alignment)
    assert torch.equal(whole(found.other, stored.reshape(shape), found, room), x)
    boxes = list(found.boxes(room))
    assert all(math.prod(stop - start for start, stop in box) <= room for box in boxes)
    assert sum(math.prod(stop - start for start, stop in box) for box in boxes) == x.numel()


def test_empty_and_scalar_tensors_have_boxes_too():
    empty = align((0, 3), "a b", (3, 0), "b a")
    assert list(empty.boxes(10)) == []
    scalar = align((), None, (), None)
    assert list(scalar.boxes(10)) == [()]
    assert scalar.ref.read(read(torch.tensor(3.0)), ()).item() == 3.0
