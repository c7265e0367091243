"""Pieces of all ranks become the logical tensor; whatever cannot be right is said, not guessed."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.store.building import info, record, write_ranks, write_run

from tensortap.errors import RunError, SelectionError
from tensortap.records import Part, Placement
from tensortap.store import open_run
from tensortap.store.assembly import assemble
from tensortap.store.pieces import Piece

NAME = "layers.0.attn.qkv/forward/output"


def piece(rank, tensor, logical=(), segments=None, partial=(), **parallel):
    placement = Placement(logical_shape=tuple(logical), segments=segments or {}, partial=partial)
    return Piece(rank, tensor, placement, parallel)


def cut(whole, axis, segments):
    """The oracle: what a rank that holds these stretches has."""
    return torch.cat([whole.narrow(axis, start, length) for start, length in segments], axis)


def split(whole, axis, segments_by_rank):
    """One piece a rank, cut from `whole` along one axis."""
    return [
        piece(rank, cut(whole, axis, segments), whole.shape, {axis: tuple(segments)})
        for rank, segments in enumerate(segments_by_rank)
    ]


@pytest.fixture
def whole():
    return torch.randn(8, 12, 5)


class TestPlacements:
    def test_tensor_parallel_columns_and_rows(self, whole):
        for axis, size in ((0, 8), (1, 12), (-3, 8)):
            half = size // 2
            pieces = split(whole, axis, [[(0, half)], [(half, half)]])
            assert assemble(pieces).equal(whole)
            assert assemble(pieces[::-1]).equal(whole)

    def test_gate_and_up_fused_over_two_ranks(self, whole):
        pieces = split(whole, 1, [[(0, 3), (6, 3)], [(3, 3), (9, 3)]])
        assert assemble(pieces).equal(whole)

    def test_interleaved_query_groups(self):
        heads = torch.randn(4, 24)  # q0 q1 k v of three groups, dim 2
        groups = [[(0, 8)], [(8, 8)], [(16, 8)]]
        assert assemble(split(heads, 1, groups)).equal(heads)
        # Grouped storage, logical order q… k… v…: each rank holds stretches of all three.
        logical = [[(4 * g, 4), (12 + 2 * g, 2), (18 + 2 * g, 2)] for g in range(3)]
        assert assemble(split(heads, 1, logical)).equal(heads)

    def test_zigzag_context_parallelism(self, whole):
        chunks = [[(2 * r, 2), (8 - 2 * r - 2, 2)] for r in range(2)]
        assert assemble(split(whole, 0, chunks)).equal(whole)

    def test_several_axes_at_once(self, whole):
        pieces = []
        for rank in range(4):
            rows = ((0, 2), (6, 2)) if rank % 2 else ((2, 4),)
            columns = ((4, 4), (0, 4)) if rank // 2 else ((8, 4),)
            mine = cut(cut(whole, 0, rows), 1, columns)
            pieces.append(piece(rank, mine, whole.shape, {0: rows, 1: columns}))
        assert assemble(pieces).equal(whole)

    def test_strided_shards_of_fsdp_over_tensor_parallel(self):
        weight = torch.randn(16, 4)
        ranks = [[(2 * r + 8 * half, 2) for half in (0, 1)] for r in range(4)]
        assert assemble(split(weight, 0, ranks)).equal(weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e5m2, torch.bool, torch.int64])
    def test_any_dtype_is_assembled_bitwise(self, whole, dtype):
        values = (whole * 100).to(dtype)
        raw = [cut(values.view(torch.uint8) if dtype.itemsize == 1 else values, 0, s)
               for s in ([(0, 4)], [(4, 4)])]  # fmt: skip
        pieces = [
            piece(rank, part.view(dtype), whole.shape, {0: ((4 * rank, 4),)})
            for rank, part in enumerate(raw)
        ]
        assert assemble(pieces).view(torch.uint8).equal(values.view(torch.uint8))

    def test_scalars_and_empty_tensors(self):
        assert assemble([piece(0, torch.tensor(3.0)), piece(1, torch.tensor(3.0))]).item() == 3
        assert assemble([piece(0, torch.empty(0, 4), (0, 4))]).shape == (0, 4)
        parts = split(torch.randn(4, 2), 0, [[(0, 4)], [(4, 0)]])
        assert assemble(parts).shape == (4, 2)

    def test_a_single_whole_piece_is_not_copied(self, whole):
        assert assemble([piece(0, whole)]).data_ptr() == whole.data_ptr()

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_any_partition_of_any_axes_is_put_back(self, data):
        shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
        whole = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        axes = []
        for size in shape:
            borders = sorted({0, size} | set(data.draw(st.lists(st.integers(0, size), max_size=3))))
            runs = [(a, b - a) for a, b in itertools.pairwise(borders)]
            owners = [data.draw(st.integers(0, 1)) for _ in runs]
            shares = [[r for r, o in zip(runs, owners, strict=True) if o == who] for who in (0, 1)]
            axes.append([data.draw(st.permutations(share)) for share in shares if share])
        combinations = [[]]
        for shares in axes:
            combinations = [[*c, share] for c in combinations for share in shares]
        pieces = []
        for rank, shares in enumerate(combinations):
            mine = whole
            for axis, share in enumerate(shares):
                mine = cut(mine, axis, share)
            segments = {axis: tuple(share) for axis, share in enumerate(shares)}
            pieces.append(piece(rank, mine, shape, segments))
        assert assemble(pieces).equal(whole)


class TestOverlap:
    def test_replicas_that_agree_are_one_tensor(self, whole):
        whole[0, 0, 0] = float("nan")
        assert assemble([piece(r, whole.clone()) for r in range(3)])[1:].equal(whole[1:])

    def test_partly_overlapping_pieces_that_agree(self, whole):
        pieces = split(whole, 1, [[(0, 8)], [(4, 8)], [(2, 3)]])
        assert assemble(pieces).equal(whole)

    def test_a_disagreement_names_ranks_range_and_difference(self, whole):
        pieces = split(whole, 1, [[(0, 8)], [(4, 8)]])
        pieces[1].tensor[3, 1, 2] += 0.5  # logical [3, 5, 2]
        with pytest.raises(RunError, match=r"ranks 0 and 1 .*\[0:8, 4:8, 0:5\].*0\.5"):
            assemble(pieces)

    def test_zero_and_negative_zero_disagree(self):
        with pytest.raises(RunError, match="disagree"):
            assemble([piece(0, torch.tensor([0.0])), piece(1, torch.tensor([-0.0]))])

    def test_nan_against_a_number_disagrees_in_words(self):
        with pytest.raises(RunError, match="NaN"):
            assemble([piece(0, torch.tensor([1.0])), piece(1, torch.tensor([float("nan")]))])

    def test_a_piece_that_contradicts_itself_is_noticed(self):
        overlapping = piece(0, torch.arange(6.0), (4,), {0: ((0, 4), (2, 2))})
        with pytest.raises(RunError, match="ranks 0 and 0"):
            assemble([overlapping])

    def test_pieces_of_different_dtype_or_logical_shape(self, whole):
        with pytest.raises(RunError, match="dtype"):
            assemble([piece(0, whole), piece(1, whole.double())])
        with pytest.raises(RunError, match="logical shape"):
            assemble([piece(0, whole), piece(1, whole[:4])])


class TestHoles:
    def test_a_missing_rank_is_listed(self, whole):
        pieces = split(whole, 1, [[(0, 4)], [(4, 4)], [(8, 4)]])
        with pytest.raises(RunError, match=re.escape("[0:8, 4:8, 0:5]")):
            assemble([pieces[0], pieces[2]])

    def test_an_absurd_logical_shape_allocates_nothing(self):
        with pytest.raises(RunError, match="nothing was captured of"):
            assemble([piece(0, torch.ones(2, 2), (1 << 40, 1 << 40), {0: ((0, 2),), 1: ((0, 2),)})])

    def test_too_many_segments_are_refused(self):
        runs = tuple((2 * n, 1) for n in range(3000))
        many = piece(0, torch.ones(3000, 3000), (6000, 6000), {0: runs, 1: runs})
        with pytest.raises(RunError, match="too many"):
            assemble([many])

    @pytest.mark.parametrize(
        ("logical", "segments"),
        [
            ((8, 12, 5), {0: ((0, 4),)}),
            ((8, 12, 5), {0: ((4, 8),)}),
            ((8, 12), {}),
            ((8, 12, 5), {3: ((0, 1),)}),
            ((9, 12, 5), {}),
        ],
    )
    def test_a_placement_that_does_not_fit_the_piece(self, whole, logical, segments):
        with pytest.raises(RunError, match="placement"):
            assemble([piece(2, whole, logical, segments)])


class TestPartial:
    def test_summands_are_added_in_float64_and_rounded_once(self):
        parts = [torch.randn(50).to(torch.bfloat16) for _ in range(4)]
        pieces = [
            piece(r, part, partial=("tp",), tp=4, tp_rank=r, dp=1, dp_rank=0)
            for r, part in enumerate(parts)
        ]
        expected = sum(part.double() for part in parts).to(torch.bfloat16)
        assert assemble(pieces).equal(expected)

    def test_summands_over_two_groups_and_segments(self):
        whole = torch.randint(-9, 9, (6, 4))
        pieces = []
        for rank in range(8):
            tp, cp, half = rank % 2, (rank // 2) % 2, rank // 4
            share = whole[3 * half : 3 * half + 3] * (1 if (tp, cp) == (0, 0) else 0)
            pieces.append(
                piece(
                    rank, share + tp - cp, (6, 4), {0: ((3 * half, 3),)}, ("tp", "cp"),
                    tp=2, tp_rank=tp, cp=2, cp_rank=cp, sp_rank=half,
                )
            )  # fmt: skip
        assert assemble(pieces).equal(whole)

    def test_a_missing_summand_is_an_error(self):
        pieces = [piece(r, torch.ones(2), partial=("tp",), tp=3, tp_rank=r) for r in (0, 2)]
        with pytest.raises(RunError, match=r"3 summands.*\[0, 2\]"):
            assemble(pieces)

    def test_a_group_that_the_run_does_not_know_is_an_error(self):
        with pytest.raises(RunError, match="tp_rank"):
            assemble([piece(0, torch.ones(2), partial=("tp",), pp=1, pp_rank=0)])

    def test_replicas_of_a_sum_must_agree(self):
        pieces = [
            piece(2 * d + t, torch.full((2,), 1.0 + d), partial=("tp",),
                  tp=2, tp_rank=t, dp=2, dp_rank=d)
            for d in range(2) for t in range(2)
        ]  # fmt: skip
        with pytest.raises(RunError, match="largest difference is 2"):
            assemble(pieces)


class TestThroughARun:
    def test_tensor_parallel_pieces(self, tmp_path, whole):
        halves = [
            (whole[:, :6].contiguous(), Placement((8, 12, 5), {1: ((0, 6),)})),
            (whole[:, 6:].contiguous(), Placement((8, 12, 5), {1: ((6, 6),)})),
        ]
        parallel = [{"tp": 2, "tp_rank": r, "dp": 1, "dp_rank": 0} for r in (0, 1)]
        write_ranks(tmp_path / "run", NAME, halves, parallel)
        with open_run(tmp_path / "run") as run:
            assert run.tensor(NAME).equal(whole)
            assert run.tensor(NAME, rank=1).equal(whole[:, 6:])

    def test_data_parallel_ranks_are_chosen_not_merged(self, tmp_path):
        pieces = [(torch.full((2,), float(r)), None) for r in range(2)]
        parallel = [{"dp": 2, "dp_rank": r} for r in range(2)]
        write_ranks(tmp_path / "run", NAME, pieces, parallel)
        with open_run(tmp_path / "run") as run:
            with pytest.raises(RunError, match="dp_rank=0 or 1"):
                run.tensor(NAME)
            assert run.tensor(NAME, dp_rank=1).equal(torch.ones(2))
            with pytest.raises(RunError, match="no dp_rank=7"):
                run.tensor(NAME, dp_rank=7)

    def test_a_rank_whose_place_is_lost_is_not_guessed(self, tmp_path, whole):
        parallel = [{"tp": 2, "tp_rank": r} for r in (0, 1)]
        write_ranks(tmp_path / "run", NAME, [(whole, None), (whole, None)], parallel)
        (tmp_path / "run/rank00001/rank.json").write_text("{}")
        with open_run(tmp_path / "run") as run:
            with pytest.raises(RunError, match=r"rank\.json of rank 1"):
                run.tensor(NAME)
            assert run.tensor(NAME, rank=1).equal(whole)

    def test_ranks_that_say_nothing_about_parallelism_are_data_parallel(self, tmp_path):
        write_ranks(tmp_path / "run", NAME, [(torch.full((2,), float(r)), None) for r in range(2)])
        with open_run(tmp_path / "run") as run:
            assert run.tensor(NAME, dp_rank=1).equal(torch.ones(2))

    def test_parameters_are_assembled_over_data_parallel_shards(self, tmp_path):
        weight = torch.randn(4, 3)
        name = "layers.0.mlp.up/param/weight"
        shards = [(weight[2 * r : 2 * r + 2].clone(), Placement((4, 3), {0: ((2 * r, 2),)}))
                  for r in range(2)]  # fmt: skip
        write_ranks(tmp_path / "run", name, shards, [{"dp": 2, "dp_rank": r} for r in range(2)])
        with open_run(tmp_path / "run") as run:
            assert run.tensor(name).equal(weight)

    def test_gradients_that_were_not_reduced_are_summed(self, tmp_path):
        name = "layers.0.mlp.up/grad/weight"
        pieces = [(torch.full((2,), r + 1.0), Placement(partial=("dp",))) for r in range(2)]
        write_ranks(tmp_path / "run", name, pieces, [{"dp": 2, "dp_rank": r} for r in range(2)])
        with open_run(tmp_path / "run") as run:
            assert run.tensor(name).equal(torch.full((2,), 3.0))

    def test_an_unknown_placement_has_to_be_asked_for_by_rank(self, tmp_path, whole):
        write_run(
            tmp_path / "run", [(record(NAME, whole, placement=Placement(unknown=True)), whole)]
        )
        with open_run(tmp_path / "run") as run:
            with pytest.raises(RunError, match="rank=0"):
                run.tensor(NAME)
            assert run.tensor(NAME, rank=0).equal(whole)

    def test_parts_of_a_fused_tensor_are_served_as_if_captured(self, tmp_path):
        whole = torch.randn(2, 24)
        parts = (
            Part("layers.0.attn.q", -1, tuple((8 * g, 4) for g in range(3))),
            Part("layers.0.attn.k", -1, tuple((8 * g + 4, 2) for g in range(3))),
            Part("layers.0.attn.v", 1, tuple((8 * g + 6, 2) for g in range(3))),
        )
        pieces = []
        for runs in (((0, 8), (16, 8)), ((8, 8),)):
            placement = Placement((2, 24), {1: runs}, parts=parts)
            pieces.append((cut(whole, 1, runs), placement))
        parallel = [{"tp": 2, "tp_rank": r} for r in (0, 1)]
        write_ranks(tmp_path / "run", NAME, pieces, parallel)
        grouped = whole.reshape(2, 3, 8)
        with open_run(tmp_path / "run") as run:
            assert run.part_names() == [f"layers.0.attn.{w}/forward/output" for w in "kqv"]
            for word, expected in (
                ("q", grouped[:, :, :4]), ("k", grouped[:, :, 4:6]), ("v", grouped[:, :, 6:]),
            ):  # fmt: skip
                name = f"layers.0.attn.{word}/forward/output"
                assert run.tensor(name).equal(expected.reshape(2, -1))
                alone = run.tensor(name, rank=0)
                assert alone.equal(expected[:, [0, 2]].reshape(2, -1))
            with pytest.raises(RunError, match=r"layers\.0\.attn\.q/forward/output"):
                run.tensor("layers.0.attn.p/forward/output")

    def test_the_name_of_a_part_selects_the_records_of_its_fused_tensor(self, tmp_path):
        whole = torch.randn(2, 24)
        parts = tuple(Part(f"layers.0.attn.{w}", 1, ((8 * n, 8),)) for n, w in enumerate("qkv"))
        fused = record(NAME, whole, placement=Placement((2, 24), parts=parts))
        other = record("layers.0.mlp.up/forward/output", whole, 1)
        write_run(tmp_path / "run", [(fused, whole), (other, whole)])

        def selected(select):
            names = [str(found.name) for found in run.records(select)]
            assert list(run.table(select).column("name")) == names
            return names

        with open_run(tmp_path / "run") as run:
            assert selected("layers.0.attn.q/*") == [NAME]
            assert selected("*.attn.k/forward/output,*.up/*") == [NAME, str(other.name)]
            assert selected("*.attn.*") == [NAME]
            assert selected(f"*,!{NAME}") == [str(other.name)]
            with pytest.raises(SelectionError, match=r"layers\.0\.attn\.q"):
                run.records("layers.0.attn.p/*")

    def test_padding_is_cut_on_request(self, tmp_path, whole):
        halves = []
        for rank in (0, 1):
            placement = Placement((8, 12, 5), {1: ((6 * rank, 6),)}, {1: 10, 0: 7})
            halves.append((whole[:, 6 * rank : 6 * rank + 6].clone(), placement))
        write_ranks(tmp_path / "run", NAME, halves, [{"tp": 2, "tp_rank": r} for r in (0, 1)])
        with open_run(tmp_path / "run") as run:
            assert run.tensor(NAME).equal(whole)
            assert run.tensor(NAME, padded=False).equal(whole[:7, :10])
            assert run.tensor(NAME, rank=1, padded=False).equal(whole[:7, 6:10])

    def test_a_disagreement_of_replicas_names_the_tensor(self, tmp_path, whole):
        parallel = [{"tp": 2, "tp_rank": r, "dp_rank": 0} for r in (0, 1)]
        write_ranks(tmp_path / "run", NAME, [(whole, None), (whole + 1, None)], parallel)
        with open_run(tmp_path / "run") as run, pytest.raises(RunError, match=re.escape(NAME)):
            run.tensor(NAME)

    def test_a_missing_rank_is_a_problem_unless_it_was_not_selected(self, tmp_path):
        for path, ranks in (("all", ""), ("some", "0,2")):
            run_info = info(world_size=3, settings={"ranks": ranks})
            write_run(tmp_path / path, [(record(), None)], run_info)
        with open_run(tmp_path / "all") as run:
            assert "2 of 3 ranks are missing: 1, 2" in " ".join(run.problems)
        with open_run(tmp_path / "some") as run:
            assert "1 of 3 ranks are missing: 2" in " ".join(run.problems)
