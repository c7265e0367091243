"""Which tensors of two runs are compared, and what is said of those that are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.core.store.building import info, record, write_ranks, write_run

from tensortap.records import Part, Placement
from tensortap.stats import statistics
from tensortap_analysis import compare
from tensortap_analysis.metrics import measure_tensors

OUT = "layers.0.attn.{}/forward/output"


def run_of(path, tensors, **fields):
    """A run of `{name: tensor}`, or of (name, tensor, record fields) rows."""
    rows = [(n, t, {}) for n, t in tensors.items()] if isinstance(tensors, dict) else tensors
    items = []
    for seq, (name, tensor, more) in enumerate(rows):
        options = fields | more
        kept = None if options.get("values") == "stats" else tensor
        items.append((record(name, kept, seq, shape=tuple(tensor.shape), **options), kept))
    return write_run(path, items)


def qkv(order=("q", "k", "v"), sizes=(4, 2, 2)):
    """A placement that says where q, k and v lie in the last axis of a fused tensor."""
    parts, start = [], 0
    for word in order:
        size = sizes["qkv".index(word)]
        parts.append(Part(f"layers.0.attn.{word}", -1, ((start, size),)))
        start += size
    return Placement((3, 8), parts=tuple(parts))


@pytest.fixture
def split():
    return {
        OUT.format(word): torch.randn(3, size) for word, size in zip("qkv", (4, 2, 2), strict=True)
    }


def test_batch_first_meets_sequence_first_and_metrics_are_those_of_the_tensors(tmp_path):
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    a = run_of(tmp_path / "a", {"embed/forward/output": x}, dims="batch seq hidden")
    b = run_of(tmp_path / "b", {"embed/forward/output": y.transpose(0, 1).contiguous()},
               dims="seq batch hidden")  # fmt: skip
    [pair] = compare(a, b).runs[0].pairs
    assert pair.metrics == measure_tensors(x, y)
    assert pair.ref.shape == (2, 5, 3)
    assert pair.other.shape == (5, 2, 3)


@pytest.mark.parametrize("fused_first", [True, False])
def test_fused_meets_split(tmp_path, split, fused_first):
    q, k, v = split.values()
    fused = torch.cat([v, q, k], dim=-1)
    one = run_of(tmp_path / "split", split)
    two = run_of(tmp_path / "fused", {OUT.format("qkv"): fused}, placement=qkv("vqk"))
    found = compare(*((two, one) if fused_first else (one, two)))
    [run] = found.runs
    assert found.verdict == "agree"
    assert sorted(pair.name for pair in run.pairs) == sorted(split)
    assert all(pair.equal for pair in run.pairs)
    assert run.unpaired == ()


def test_a_part_that_only_one_side_has_is_listed(tmp_path, split):
    fused = torch.cat(list(split.values()), dim=-1)
    del split[OUT.format("v")]
    one = run_of(tmp_path / "split", split)
    two = run_of(tmp_path / "fused", {OUT.format("qkv"): fused}, placement=qkv())
    [run] = compare(one, two).runs
    assert [(u.name, u.where, u.reason) for u in run.unpaired] == [
        (OUT.format("v"), "run", "REF has no such tensor")
    ]


def test_two_fused_alike_are_compared_whole_and_two_fused_otherwise_by_parts(tmp_path, split):
    q, k, v = split.values()
    name = {OUT.format("qkv"): torch.cat([q, k, v], dim=-1)}
    one = run_of(tmp_path / "one", name, placement=qkv())
    alike = run_of(tmp_path / "alike", name, placement=qkv())
    other = run_of(tmp_path / "other", {OUT.format("qkv"): torch.cat([k, v, q], dim=-1)},
                   placement=qkv("kvq"))  # fmt: skip
    alike, other = compare(one, alike, other).runs
    assert [pair.name for pair in alike.pairs] == [OUT.format("qkv")]
    assert sorted(pair.name for pair in other.pairs) == sorted(split)
    assert all(pair.equal for pair in (*alike.pairs, *other.pairs))
    assert alike.unpaired == other.unpaired == ()


def test_each_tensor_has_its_noise_however_the_noise_run_holds_it(tmp_path, split):
    def of(path, order, error):
        tensors = [split[OUT.format(word)] + error for word in order]
        whole = {OUT.format("qkv"): torch.cat(tensors, dim=-1)}
        return run_of(tmp_path / path, whole, placement=qkv(order))

    ref, noise = of("ref", "qkv", 0.0), of("noise", "qkv", 0.01)
    parts = run_of(tmp_path / "parts", {name: x + 0.01 for name, x in split.items()})
    [run] = compare(ref, parts, noise=noise).runs
    assert sorted(pair.name for pair in run.pairs) == sorted(split)
    for pair in run.pairs:
        assert pair.noise.metrics.rmse == pytest.approx(pair.metrics.rmse, rel=1e-3)
    whole = of("whole", "qkv", 0.02)
    [pair] = compare(ref, whole, noise=noise).runs[0].pairs
    assert pair.noise.metrics.rmse == pytest.approx(0.01, rel=1e-3)
    # A noise run that is cut in another order has the parts, but not the whole as it is here.
    [pair] = compare(ref, whole, noise=of("otherwise", "vkq", 0.01)).runs[0].pairs
    assert pair.noise is None


def test_a_selected_part_is_compared_alone(tmp_path, split):
    fused = {OUT.format("qkv"): torch.cat(list(split.values()), dim=-1)}
    a = run_of(tmp_path / "a", fused, placement=qkv())
    b = run_of(tmp_path / "b", fused, placement=qkv())
    for other in (b, run_of(tmp_path / "c", split)):
        [run] = compare(a, other, select="layers.*.attn.k").runs
        assert [pair.name for pair in run.pairs] == [OUT.format("k")]
        assert run.unpaired == ()


def test_shards_are_assembled_and_padding_is_cut(tmp_path):
    x = torch.randn(3, 6)
    whole = run_of(tmp_path / "whole", {"lm_head/forward/output": x})
    padded = torch.cat([x, torch.full((3, 2), 1e9)], dim=-1)
    pieces = [
        (padded[:, start : start + 4].contiguous(),
         Placement((3, 8), {1: ((start, 4),)}, valid={1: 6}))
        for start in (0, 4)
    ]  # fmt: skip
    places = [{"tp": 2, "tp_rank": rank} for rank in (0, 1)]
    spread = write_ranks(tmp_path / "spread", "lm_head/forward/output", pieces, places)
    [pair] = compare(whole, spread).runs[0].pairs
    assert pair.equal
    assert pair.other.shape == (3, 6)


def test_what_is_padding_to_one_side_is_not_compared_on_the_other(tmp_path):
    x = torch.randn(3, 2, 8)
    whole = run_of(tmp_path / "whole", {"lm_head/forward/output": x}, dims="batch seq vocab")
    y = x.transpose(0, 1).contiguous()
    y[..., 6:] = 1e9
    place = Placement((2, 3, 8), valid={2: 6})
    cut = run_of(
        tmp_path / "cut", {"lm_head/forward/output": y}, dims="seq batch out", placement=place
    )
    for one, other in ((whole, cut), (cut, whole)):
        [run] = compare(one, other).runs
        assert run.unpaired == ()
        assert run.pairs[0].metrics.count == 3 * 2 * 6
        assert run.pairs[0].error == 0


def test_data_parallel_ranks_are_paired_rank_by_rank(tmp_path):
    x = [torch.randn(2, 3) for _ in range(2)]
    places = [{"dp": 2, "dp_rank": rank} for rank in (0, 1)]
    name = "embed/forward/output"
    a, b = (
        write_ranks(tmp_path / word, name, [(t, None) for t in tensors], places)
        for word, tensors in (("a", x), ("b", [x[0], x[1] + 1]))
    )
    [run] = compare(a, b).runs
    assert [(pair.at.dp_rank, pair.equal) for pair in run.pairs] == [(0, True), (1, False)]
    single = run_of(tmp_path / "single", {name: x[0]})
    [run] = compare(single, a).runs
    assert [pair.equal for pair in run.pairs] == [True]
    assert [(u.where, u.count) for u in run.unpaired] == [("run", 1)]


def test_every_missing_name_is_listed_once_with_the_side_that_has_it(tmp_path):
    x = torch.randn(2)
    norms = [("final_norm/forward/output", x, {"step": step}) for step in range(3)]
    a = run_of(tmp_path / "a", [("embed/forward/output", x, {}), *norms])
    b = run_of(tmp_path / "b", {"embed/forward/output": x, "lm_head/forward/output": x})
    [run] = compare(a, b).runs
    assert [(u.name, u.where, u.reason, u.count) for u in run.unpaired] == [
        ("final_norm/forward/output", "ref", "RUN has no such tensor", 3),
        ("lm_head/forward/output", "run", "REF has no such tensor", 1),
    ]


def test_other_steps_microbatches_and_calls_are_said_in_words(tmp_path):
    x = torch.randn(2)
    rows = [
        ("a/forward/output", {"step": 0}),
        ("a/forward/output", {"step": 1}),
        ("b/forward/output", {"microbatch": 1}),
        ("c/forward/output", {"eval": True}),
    ]
    others = [
        ("a/forward/output", {"step": 0}),
        ("a/forward/output", {"step": 5}),
        ("b/forward/output", {"microbatch": 0}),
        ("c/forward/output", {}),
    ]
    a, b = (
        run_of(tmp_path / word, [(name, x, more) for name, more in listed])
        for word, listed in (("a", rows), ("b", others))
    )
    [run] = compare(a, b).runs
    assert [pair.at.when for pair in run.pairs] == ["step 0"]
    reasons = {(u.name[0], u.where): u.reason for u in run.unpaired}
    assert reasons["a", "ref"] == "RUN has it at other steps only: 0, 5"
    assert reasons["a", "run"] == "REF has it at other steps only: 0-1"
    assert reasons["b", "ref"] == "RUN has it at other microbatches only: 0"
    assert reasons["c", "ref"] == "RUN has no evaluation forward of it"
    assert reasons["c", "run"] == "REF has it in other calls only"


def test_shapes_that_do_not_match_are_listed_and_the_rest_is_compared(tmp_path):
    x = torch.randn(2, 3)
    a = run_of(tmp_path / "a", {"embed/forward/output": x, "lm_head/forward/output": x})
    b = run_of(
        tmp_path / "b", {"embed/forward/output": x, "lm_head/forward/output": x[:, :2].clone()}
    )
    [run] = compare(a, b).runs
    assert [pair.name for pair in run.pairs] == ["embed/forward/output"]
    [one] = run.unpaired
    assert (one.name, one.where) == ("lm_head/forward/output", "both")
    assert one.reason == "shapes 2x3 and 2x2 do not match"


def test_a_damaged_or_missing_payload_is_listed_and_the_rest_is_compared(tmp_path):
    tensors = {f"layers.{n}/forward/output": torch.randn(64) for n in range(3)}
    a, b = run_of(tmp_path / "a", tensors), run_of(tmp_path / "b", tensors)
    [shard] = (b / "rank00000").glob("*.safetensors")
    stored = shard.read_bytes()
    needle = tensors["layers.1/forward/output"].numpy().tobytes()
    shard.write_bytes(stored.replace(needle, b"\1" * len(needle)))
    [run] = compare(a, b).runs
    assert [pair.name for pair in run.pairs] == [f"layers.{n}/forward/output" for n in (0, 2)]
    [one] = run.unpaired
    assert (one.name, one.where) == ("layers.1/forward/output", "both")
    assert "do not match their digest" in one.reason
    shard.unlink()
    [run] = compare(a, b).runs
    assert run.verdict == "incomparable"
    assert len(run.unpaired) == 3


def test_statistics_alone_compare_and_say_so(tmp_path):
    x = torch.randn(4, 50)
    y = x + 0.1
    rows = [
        ("embed/forward/output", t, {"values": "stats", "stats": statistics(t)}) for t in (x, y)
    ]
    a, b = (run_of(tmp_path / word, [row]) for word, row in zip("ab", rows, strict=True))
    [pair] = compare(a, b).runs[0].pairs
    assert pair.by == "statistics"
    assert pair.note == "statistics only"
    exact = measure_tensors(x, y)
    assert pair.metrics.mse is None
    assert pair.metrics.other.mean == pytest.approx(exact.other.mean)
    assert 0 < pair.bounds.rmse <= exact.rmse * (1 + 1e-6)
    assert 0 < pair.bounds.max_abs <= exact.max_abs * (1 + 1e-6)
    assert pair.bounds.relative_l2 <= exact.relative_l2 * (1 + 1e-6)
    assert compare(a, b).verdict == "differ"
    full = run_of(tmp_path / "full", {"embed/forward/output": x})
    [pair] = compare(full, a).runs[0].pairs
    assert (pair.by, pair.equal) == ("statistics", True)


@pytest.mark.parametrize("seed", range(5))
def test_statistics_never_claim_more_than_the_tensors_differ(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, generator=generator)
    y = x[torch.randperm(300, generator=generator)] if seed % 2 else x * 1.01
    rows = [
        ("embed/forward/output", t, {"values": "stats", "stats": statistics(t)}) for t in (x, y)
    ]
    a, b = (run_of(tmp_path / word, [row]) for word, row in zip("ab", rows, strict=True))
    [pair] = compare(a, b).runs[0].pairs
    exact = measure_tensors(x, y)
    assert pair.bounds.rmse <= exact.rmse * (1 + 1e-9)
    assert pair.bounds.max_abs <= exact.max_abs * (1 + 1e-9)
    assert pair.bounds.max_abs > 0  # a permutation is seen in the leading values


def test_statistics_of_shards_merge_to_those_of_the_whole(tmp_path):
    x = torch.randn(3, 8, dtype=torch.float64) + 5
    a = run_of(tmp_path / "a", [("embed/forward/output", x,
                                 {"values": "stats", "stats": statistics(x)})])  # fmt: skip
    for rank, start in enumerate((0, 4)):
        piece = x[:, start : start + 4].contiguous()
        place = Placement((3, 8), {1: ((start, 4),)})
        fields = {"shape": (3, 4), "dtype": "float64", "stats": statistics(piece)}
        name = "embed/forward/output"
        written = record(name, None, rank=rank, placement=place, **fields)
        parallel = {"tp": 2, "tp_rank": rank}
        run = info(rank=rank, world_size=2, parallel=parallel)
        write_run(tmp_path / "b", [(written, None)], run)
    [pair] = compare(a, tmp_path / "b").runs[0].pairs
    assert pair.error < 1e-12
    assert pair.metrics.other.std == pytest.approx(x.std(correction=0).item())
    assert pair.metrics.other.rms == pytest.approx(x.square().mean().sqrt().item())


def test_samples_of_the_same_places_compare_exactly_and_others_by_statistics(tmp_path):
    x, y = torch.randn(40), torch.randn(40)

    def sampled(path, tensor, stride):
        kept = tensor[::stride].clone()
        written = record("embed/forward/output", None, values="sample", stride=stride, shape=(40,),
                         stats=statistics(tensor))  # fmt: skip
        return write_run(path, [(written, kept)])

    a, b, c = (sampled(tmp_path / w, t, s) for w, t, s in (("a", x, 4), ("b", y, 4), ("c", y, 5)))
    full = run_of(tmp_path / "full", {"embed/forward/output": y})
    for other in (b, full):
        [pair] = compare(a, other).runs[0].pairs
        assert pair.by == "sample"
        of_sample = measure_tensors(x[::4], y[::4])
        [at] = of_sample.max_abs_at
        assert pair.metrics == replace(of_sample, max_abs_at=(4 * at,))  # its place in the tensor
        assert pair.note == "1 in 4 elements"
    [pair] = compare(a, c).runs[0].pairs
    assert pair.by == "statistics"


def test_gradients_are_the_last_sum_of_their_step(tmp_path):
    sums = [torch.full((3,), float(n)) for n in (1, 2)]
    rows = [("lm_head/grad/weight", t, {"microbatch": n}) for n, t in enumerate(sums)]
    a = run_of(tmp_path / "a", rows)
    b = run_of(tmp_path / "b", {"lm_head/grad/weight": sums[1]})
    [run] = compare(a, b).runs
    assert [pair.equal for pair in run.pairs] == [True]
    assert run.unpaired == ()
