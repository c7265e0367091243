"""Statistics and samples of pieces: placement, padding, summands and replicas are honoured."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.core.store.building import info, record, write_run

from tensortap.records import Placement
from tensortap.stats import statistics
from tensortap_analysis import compare
from tensortap_analysis.metrics import measure_tensors

NAME = "layers.0.mlp/forward/output"
TP = [{"tp": 2, "tp_rank": rank} for rank in (0, 1)]
_numbers = itertools.count()


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def written(tmp_path):
    """A run of one tensor: (piece, placement) of each rank; `None` where nothing was captured."""

    def write(*pieces, values="stats", places=TP):
        path = tmp_path / str(next(_numbers))
        for rank, (piece, place) in enumerate(pieces):
            if piece is None:
                continue
            kept = piece.reshape(-1)[::2].clone() if values == "sample" else piece
            made = record(
                NAME, None, rank=rank, placement=place, shape=tuple(piece.shape), values=values,
                stride=2 if values == "sample" else 1, stats=statistics(piece),
            )  # fmt: skip
            about = info(rank=rank, world_size=len(pieces), parallel=dict(places[rank]))
            write_run(path, [(made, None if values == "stats" else kept)], about)
        return path

    return write


def outcome(ref, run):
    """The only pair, or why there is none."""
    [found] = compare(ref, run).runs
    return found.pairs[0] if found.pairs else found.unpaired[0]


@pytest.mark.parametrize("values", ["stats", "sample", "full"])
def test_padding_is_not_compared(written, x, values):
    place = Placement((4, 6), valid={1: 4})
    one, two = x.clone(), x.clone()
    one[:, 4:], two[:, 4:] = 1e9, -7
    found = outcome(written((one, place), values=values), written((two, place), values=values))
    if values == "stats":
        assert found.reason == "statistics include the padding, which is not compared"
        assert found.kind == "unknown"
    else:
        assert found.metrics.max_abs == 0
        assert found.metrics.compared == (8 if values == "sample" else 16)


def test_a_sample_says_where_in_the_tensor_its_largest_difference_is(written, x):
    place = Placement((4, 6), valid={1: 5})
    other = x.clone()
    other[3, 2] += 9  # the 20th element, and the 10th of the sample
    full = outcome(written((x, place), values="sample"), written((other, place), values="full"))
    assert full.by == "sample"
    assert full.metrics.max_abs_at == (3, 2)
    assert full.metrics.max_abs == measure_tensors(x, other).max_abs


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "float4_e2m1fn_x2"])
def test_samples_of_odd_dtypes_are_placed_too(tmp_path, dtype):
    kind = getattr(torch, dtype, None)
    if kind is None:
        pytest.skip("this torch has no such dtype")
    size = torch.empty(1, dtype=kind).element_size()
    raw = torch.full((4, 6, size), 0x22, dtype=torch.uint8)
    changed = raw.clone()
    changed[2, 4, size - 1] = 0x32
    runs = []
    for name, whole in (("a", raw), ("b", changed)):
        tensor = whole.view(kind)[..., 0]
        kept = whole.reshape(-1, size)[::2].contiguous().view(kind)[..., 0]
        made = record(NAME, None, shape=(4, 6), dtype=dtype, values="sample", stride=2)
        assert tensor.shape == (4, 6)
        runs.append(write_run(tmp_path / name, [(made, kept)]))
    found = outcome(*runs)
    assert found.by == "sample"
    assert found.metrics.max_abs_at == (2, 4)


def test_samples_of_other_pieces_are_not_compared_as_samples(written, x):
    left = Placement((4, 12), {1: ((0, 6),)})
    right = Placement((4, 12), {1: ((6, 6),)})
    found = outcome(written((x, left), values="sample"), written((x, right), values="sample"))
    assert found.reason == "statistics of pieces that hold other elements do not compare"
    summand = Placement((4, 6), partial=("tp",))
    found = outcome(
        written((x, summand), (None, summand), values="sample"), written((x, None), values="sample")
    )
    assert found.reason == "statistics of summands do not tell those of the sum"


def test_replicas_whose_statistics_disagree_are_loud(written, x):
    place, drifted = Placement((4, 6)), x.clone()
    drifted[0, 0] += 100
    agree = outcome(written((x, None)), written((x, place), (x, place)))
    assert agree.equal
    found = outcome(written((x, None)), written((x, place), (drifted, place)))
    assert found.kind == "conflict"
    assert found.reason.startswith("ranks 0 and 1 hold the same piece and disagree")


@pytest.mark.parametrize("captured", [1, 2])
def test_summands_are_not_the_sum(written, x, captured):
    place = Placement((4, 6), partial=("tp",))
    pieces = [(x / 4, place), (x * 3 / 4 if captured == 2 else None, place)]
    found = outcome(written((x, None)), written(*pieces))
    assert found.reason == "statistics of summands do not tell those of the sum"
    alone = outcome(written((x, None)), written((x, place), places=[{"tp": 1, "tp_rank": 0}]))
    assert alone.equal


def test_pieces_merge_and_lone_ones_only_meet_the_same_elements(written, x):
    halves = [Placement((4, 6), {1: ((start, 3),)}) for start in (0, 3)]
    columns = [
        (x[:, at : at + 3].contiguous(), place) for at, place in zip((0, 3), halves, strict=True)
    ]
    whole = outcome(written((x, None)), written(*columns))
    assert whole.by == "statistics"
    assert whole.error == 0
    rows = Placement((4, 6), {0: ((0, 2),)})
    top = written((x[:2].contiguous(), rows), (None, rows))
    left = written(columns[0], (None, halves[1]))
    for ref, run in ((left, top), (written((x, None)), left)):
        assert outcome(ref, run).reason == (
            "statistics of pieces that hold other elements do not compare"
        )
    again = outcome(left, written(columns[0], (None, halves[1])))
    assert again.equal
    assert again.note == "statistics only, of one piece"


def test_pieces_without_a_place_are_not_compared(written, x):
    place = Placement(unknown=True)
    found = outcome(written((x, place)), written((x, place)))
    assert found.reason == "statistics of pieces that have no place do not compare"


def test_of_holes_only_their_number_counts(written, x):
    one, two = x.clone(), x.clone()
    one[0, 0], two[3, 5] = math.nan, math.nan  # both within what statistics are over
    two[3, 4] = 50.0
    found = outcome(written((one, None)), written((two, None)))
    assert found.bounds.rmse == found.bounds.max_abs == 0
    # The first of the leading values is NaN on one side only: that is proven.
    assert found.nonfinite
    three = x.clone()
    three[3, 4] = math.nan
    found = outcome(written((two, None)), written((three, None)))
    assert not found.nonfinite
    assert not found.equal
    two[3, 4] = three[3, 4] = math.nan
    two[3, 5] = three[3, 5]
    assert outcome(written((two, None)), written((three, None))).equal


def test_full_values_meet_statistics_in_blocks(written, x):
    halves = [Placement((4, 6), {1: ((start, 3),)}, valid={1: 5}) for start in (0, 3)]
    columns = [
        (x[:, at : at + 3].contiguous(), place) for at, place in zip((0, 3), halves, strict=True)
    ]
    [run] = compare(
        written(*columns, values="full"), written((x[:, :5].contiguous(), None)), block=4
    ).runs
    assert run.pairs[0].by == "statistics"
    assert run.pairs[0].equal
