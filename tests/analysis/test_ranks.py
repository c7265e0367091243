"""Pictures, what-if and report of runs over several ranks: shards, copies, terms and replicas."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.analysis.test_whatif import write_run as write_one
from tests.core.store.building import info, record, write_run

from tensortap import Part, Placement, open_run
from tensortap.errors import SelectionError
from tensortap.stats import statistics
from tensortap_analysis.captured.moments import captured
from tensortap_analysis.plots.gallery import plot
from tensortap_analysis.plots.samples import sample
from tensortap_analysis.plots.selecting import at_moments, latest
from tensortap_analysis.plots.survey import survey
from tensortap_analysis.report.writing import write_report
from tensortap_analysis.whatif import expected, what_if

NORM = "layers.0.input_norm/forward/output"
DOWN = "layers.0.mlp.down/param/weight"
QKV = "layers.0.attn.qkv/forward/output"
OUT = "layers.0/forward/output"
GRAD = "layers.0.mlp.down/grad/weight"
FORMATS = ("hifp8", "mxfp8", "mxfp4", "nvfp4", "int8")


pytestmark = pytest.mark.usefixtures("coarse")


def write(path, parallel, items, values="full"):
    """One closed run; `items[rank]` are (name, tensor, placement, dims)."""
    for rank, (place, mine) in enumerate(zip(parallel, items, strict=True)):
        rows = []
        for seq, (name, tensor, placement, dims) in enumerate(mine):
            stats = statistics(tensor, exponents=True)
            kept = tensor if values == "full" else None
            rows.append((
                record(name, kept, seq, rank=rank, placement=placement, dims=dims, stats=stats,
                       shape=tuple(tensor.shape)), kept,
            ))  # fmt: skip
        write_run(path, rows, info(rank=rank, world_size=len(parallel), parallel=place))
    return path


TP = [{"tp": 2, "tp_rank": rank} for rank in (0, 1)]
DP = [{"dp": 2, "dp_rank": rank} for rank in (0, 1)]
PARTS = tuple(
    Part(f"layers.0.attn.{word}", 1, ((start, size),))
    for word, start, size in (("q", 0, 64), ("k", 64, 32), ("v", 96, 32))
)


@pytest.fixture
def whole():
    spread = torch.logspace(-2, 1, 128)
    return {
        NORM: torch.randn(8, 128) * spread + 1,
        DOWN: torch.randn(48, 128) * spread,
        QKV: torch.randn(8, 128) * spread,
    }


def tensor_parallel(path, whole, values="full"):
    """A replicated activation, a weight cut along its contraction axis, a fused activation."""
    items = []
    for rank in (0, 1):
        half = slice(64 * rank, 64 * rank + 64)
        cut = {1: ((64 * rank, 64),)}
        # Each rank holds half of q, of k and of v, side by side.
        runs = ((32 * rank, 32), (64 + 16 * rank, 16), (96 + 16 * rank, 16))
        mine = torch.cat([whole[QKV][:, start : start + size] for start, size in runs], 1)
        items.append([
            (NORM, whole[NORM], None, "batch hidden"),
            (DOWN, whole[DOWN][:, half].contiguous(), Placement((48, 128), cut), "out in"),
            (QKV, mine, Placement((8, 128), {1: runs}, parts=PARTS), "batch hidden"),
        ])  # fmt: skip
    return write(path, TP, items, values)


def single(path, whole):
    dims = {NORM: "batch hidden", DOWN: "out in", QKV: "batch hidden"}
    return write_one(path, whole, dims=dims)


@pytest.mark.parametrize("values", ["full", "stats"])
def test_shards_are_one_tensor_and_copies_count_once(tmp_path, whole, values):
    with open_run(tensor_parallel(tmp_path / "run", whole, values)) as run:
        found = survey(run)
    for row, number in enumerate(found.name):
        x = whole[found.names[number]].double().numpy()
        assert found.count[row] == x.size
        for column, value in (
            ("mean", x.mean()), ("std", x.std()), ("l2", np.linalg.norm(x)),
            ("min", x.min()), ("absmax", abs(x).max()), ("rms", np.sqrt((x**2).mean())),
        ):  # fmt: skip
            assert getattr(found, column)[row] == pytest.approx(value, rel=1e-6), column


def test_formats_of_shards_are_those_of_the_whole(tmp_path, whole):
    rows = expected(tensor_parallel(tmp_path / "tp", whole), formats=FORMATS)
    alone = expected(single(tmp_path / "one", whole), formats=FORMATS)
    assert {row.name for row in rows} == set(whole)
    assert rows == alone


def test_estimates_of_shards_count_every_value_once(tmp_path, whole):
    found = what_if(tensor_parallel(tmp_path / "tp", whole, "stats"), formats=("int8", "hifp8"))
    assert found.skipped == ()
    exact = {
        (row.name, row.format): row
        for row in expected(single(tmp_path / "one", whole), formats=("int8", "hifp8"))
    }
    for row in found.rows:
        assert row.basis == "exponents"
        assert row.nonzero == exact[row.name, row.format].nonzero
        # Of int8 the scale is that of the whole, whichever rank has the largest value.
        if row.name in (DOWN, QKV):
            assert row.sqnr_db == pytest.approx(exact[row.name, row.format].sqnr_db, abs=0.5)


def test_parts_of_a_fused_tensor_are_judged_by_themselves(tmp_path, whole):
    run = tensor_parallel(tmp_path / "tp", whole)
    part = "layers.0.attn.k/forward/output"
    [row] = expected(run, formats=("mxfp8",), select=part)
    k = {part: whole[QKV][:, 64:96].contiguous()}
    [alone] = expected(write_one(tmp_path / "k", k), formats=("mxfp8",))
    assert row == alone
    for select, names in (
        ("*.attn.*", {QKV}), (f"layers.0.attn.*,!{QKV}", None), (f"{QKV},!*.attn.q/*", {QKV}),
        ("*.attn.q/*,*.attn.v/*", {part.replace(".k/", f".{word}/") for word in "qv"}),
    ):  # fmt: skip
        if names is None:
            with pytest.raises(SelectionError):
                expected(run, formats=("mxfp8",), select=select)
        else:
            rows = expected(run, formats=("mxfp8",), select=select)
            assert {row.name for row in rows} == names
    stats = tensor_parallel(tmp_path / "stats", whole, "stats")
    [skipped] = what_if(stats, formats=("mxfp8",), select=part).skipped
    assert skipped.startswith(part)


def test_pictures_show_the_assembled_tensor(tmp_path, whole):
    with open_run(tensor_parallel(tmp_path / "run", whole)) as run:
        for name, tensor in at_moments(run, latest(survey(run))).items():
            shown = sample(tensor, 1 << 20)
            assert shown.values.tolist() == whole[name].flatten().double().tolist()
        done = plot(run, tmp_path / "out", select="layers.0.attn.q/*,*/param/*")
    assert done.failed == done.left_out == []
    names = {path.name for path in done.files if path.parent.name == "heatmaps"}
    assert names == {
        "layers.0.attn.q__forward__output__step_0.png",
        "layers.0.mlp.down__param__weight__step_0.png",
    }


def data_parallel(path, values="full"):
    """Activations of different data, a weight that both hold, gradients that must be summed."""
    generator = torch.Generator().manual_seed(1)
    seen = [torch.randn(4, 64, generator=generator) * (1 + 9 * rank) for rank in (0, 1)]
    terms = [torch.randn(48, 64, generator=generator) for _ in (0, 1)]
    weight = torch.randn(48, 64, generator=generator)
    items = [
        [
            (OUT, seen[rank], None, "batch hidden"),
            (DOWN, weight, None, "out in"),
            (GRAD, terms[rank], Placement(partial=("dp",)), "out in"),
        ]
        for rank in (0, 1)
    ]
    return write(path, DP, items, values), seen, terms, weight


def test_data_parallel_ranks_are_moments_of_their_own_and_gradients_are_summed(tmp_path):
    path, seen, terms, weight = data_parallel(tmp_path / "run")
    with open_run(path) as run:
        found = {(t.name, t.moment.dp_rank): t for t in captured(run)}
        assert set(found) == {(OUT, 0), (OUT, 1), (DOWN, None), (GRAD, None)}
        for rank in (0, 1):
            assert found[OUT, rank].open().tensor().equal(seen[rank])
        assert found[DOWN, None].open().tensor().equal(weight)
        torch.testing.assert_close(found[GRAD, None].open().tensor(), terms[0] + terms[1])
        assert found[OUT, 1].moment.when == "step 0 data-parallel rank 1"
        counts = dict(zip(survey(run).names, survey(run).count.tolist(), strict=True))
    assert counts == {OUT: 2 * 4 * 64, DOWN: 48 * 64, GRAD: 48 * 64}


def test_formats_of_data_parallel_ranks_are_over_all_of_their_data(tmp_path):
    path, seen, terms, _ = data_parallel(tmp_path / "run")
    rows = {row.name: row for row in expected(path, formats=("bf16",))}
    both = torch.cat(seen)
    noise = (both.bfloat16().double() - both.double()).square().sum()
    assert rows[OUT].moments == 2
    assert rows[OUT].nonzero == both.numel()
    assert rows[OUT].sqnr_db == pytest.approx(
        10 * float(torch.log10(both.double().square().sum() / noise)), abs=1e-6
    )
    total = terms[0] + terms[1]
    error = (total.bfloat16().double() - total.double()).square().sum()
    assert rows[GRAD].moments == 1
    assert rows[GRAD].sqnr_db == pytest.approx(
        10 * float(torch.log10(total.double().square().sum() / error)), abs=1e-6
    )


@pytest.mark.parametrize("values", ["full", "stats"])
def test_the_commands_take_runs_of_several_ranks(cli, tmp_path, whole, values):
    runs = (
        tensor_parallel(tmp_path / "tp", whole, values),
        data_parallel(tmp_path / "dp", values)[0],
    )
    for path in runs:
        out = tmp_path / f"{path.name}-pictures"
        code, printed, error = cli("plot", path, "--out", out, "--worst", 0, "--json")
        assert (code, error.strip(), json.loads(printed)["failed"]) == (0, "", [])
        page = (out / "tensor_stats.txt").read_text()
        assert f"values             {int(values_of(path)):,}" in page
        code, printed, _ = cli("formats", path, "--formats", "hifp8", "--json")
        assert code == (1 if values == "stats" and path.name == "dp" else 0)
        written = write_report(tmp_path / f"{path.name}.html", path)
        assert (written.tensors, written.missing) == (3, ())


def values_of(path):
    with open_run(path) as run:
        return survey(run).count.sum()


def test_two_ways_of_splitting_a_run_agree(cli, tmp_path, whole):
    spread = tensor_parallel(tmp_path / "tp", whole)
    code, out, _ = cli("compare", single(tmp_path / "one", whole), spread, "--json")
    [run] = json.loads(out)["runs"]
    assert code == 0
    assert {row["tensor"] for row in run["tensors"]} >= {NORM, DOWN}
    assert all(row["bitwise_equal"] for row in run["tensors"])
