"""The layout `megatron-pt`: runs to the old fork's files and back."""

from __future__ import annotations

import glob
import json
import os
import random
import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tests.core.store.building import info, record, statistics, write_run
from tests.megatron.test_layout_words import split_as_the_old_visualiser_did

import tensortap
from tensortap import FormatInfo, MemorySink, Part, Placement, RunError
from tensortap.layouts import layout
from tensortap_megatron.layout import MEGATRON_PT

STEM = "20250908_092156_{:04d}_{}"


def rich_run(path):
    """Every kind of record a tap makes: phases, dtypes, coordinates, formats, placements."""
    query = torch.randn(4, 1, 2, 8, dtype=torch.bfloat16)
    sampled = torch.arange(10.0)
    items = [
        (record("layers.0.attn.core/forward/query", query, 0, dims="seq batch head dim",
                format=FormatInfo("hifp8"), stats=statistics()), query),
    ]  # fmt: skip
    plain = [
        ("layers.0.attn.core/forward/context", torch.randn(4, 1, 16), {"microbatch": 1}),
        ("layers.1.mlp.down/forward/weight", torch.randn(3, 4).half(), {"call": 2}),
        ("layers.1.mlp.down/backward/grad_output", torch.randn(2, 3), {}),
        ("layers.1.mlp.down/backward/grad_input", torch.randn(2, 4), {"recompute": True}),
        ("layers.1.mlp.down/grad/weight", torch.randn(3, 4, dtype=torch.float64), {}),
        ("layers.1.mlp.down/param/weight", torch.randn(3, 4), {}),
        ("layers.1.mlp.router/forward/output", torch.randint(9, (3, 2)), {"eval": True}),
        ("embed/forward/output", torch.tensor([float("nan"), float("inf"), -0.0]), {}),
        ("final_norm/forward/output", torch.randn(5).to(torch.float8_e4m3fn), {}),
        ("lm_head/forward/output", torch.empty(0, 3), {}),
        ("my.hand/forward/flag", torch.tensor(True), {}),
        ("my.hand/forward/z", torch.randn(2, 2, dtype=torch.complex128), {}),
    ]
    for seq, (name, tensor, at) in enumerate(plain, start=1):
        items.append((record(name, tensor, seq, step=seq % 2, **at), tensor))
    strided = record("my.hand/forward/s", torch.zeros(95), 99, values="sample", stride=10)
    items.append((strided, sampled))
    run = info(format="mxfp4", model_class="GPTModel", mode="mxfp4", metadata={"prompt": "hi"})
    return write_run(path, items, run, steps=(0, 1))


def same_bits(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)]
    return torch.equal(*raw)


def assert_same_run(before, after):
    assert after.names() == before.names()
    ours, theirs = list(before.records()), list(after.records())
    assert [replace(r, payload=None) for r in theirs] == [replace(r, payload=None) for r in ours]
    for mine, other in zip(ours, theirs, strict=True):
        assert same_bits(before.piece(mine), after.piece(other)), mine.name
    for rank in before.ranks:
        one, other = before.info_of(rank), after.info_of(rank)
        assert replace(other, launch_id="") == replace(one, launch_id="")


def test_export_and_import_give_the_same_run_again(cli, tmp_path):
    run = rich_run(tmp_path / "run")
    code, out, err = cli("export", run, "--layout", "megatron-pt", "--out", tmp_path / "old")
    assert (code, out.split()[:5]) == (0, ["14", "records", "in", "14", "files:"]), err
    code, _, err = cli(
        "import", tmp_path / "old", "--layout", "megatron-pt", "--out", tmp_path / "b"
    )
    assert code == 0, err
    assert_same_run(tensortap.open_run(run), tensortap.open_run(tmp_path / "b"))
    assert cli("coverage", tmp_path / "b")[0] == 0
    assert tensortap.open_run(tmp_path / "b").verify() == []


def test_files_are_numbered_in_the_order_of_execution_and_dated_by_the_run(tmp_path):
    run = tensortap.open_run(rich_run(tmp_path / "run"))
    MEGATRON_PT.export(run, tmp_path / "old", "*", lambda done: None)
    names = sorted(path.name for path in (tmp_path / "old").glob("*.pt"))
    assert names[0] == "20260101_000000_0001_attention_L0_forward_hifp8_query.pt"
    assert names[1] == "20260101_000000_0002_linear_L1_forward_mxfp4_weight.pt"
    order = [str(r.name) for r in run.records()]
    assert [load(tmp_path / "old" / n)["metadata"]["name"] for n in names] == order


def load(path):
    return torch.load(path, weights_only=True)


def test_the_old_visualiser_reads_every_file(tmp_path):
    """What quick_visualize.py did: glob, load, flatten, count by the words in the metadata."""
    run = tensortap.open_run(rich_run(tmp_path / "run"))
    MEGATRON_PT.export(run, tmp_path / "old", "layers.*,embed*,final*", lambda done: None)
    files = glob.glob(f"{tmp_path / 'old'}/*.pt")
    counts = Counter()
    for file in files:
        content = torch.load(file, map_location="cpu", weights_only=True)
        values, metadata = content["tensor"].float().numpy().flatten(), content["metadata"]
        assert content["tensor_info"]["shape"] == list(content["tensor"].shape)
        assert values.size == content["tensor"].numel()
        fields = split_as_the_old_visualiser_did(os.path.basename(file))
        for word in ("layer_type", "operation", "quant_type"):
            assert metadata[word] == fields[word]
        assert (metadata["layer_idx"], metadata["tensor_name"]) == (
            fields["layer"],
            fields["tensor"],
        )
        counts[metadata["layer_type"]] += 1
    assert counts == {"attention": 2, "linear": 5, "router": 1, "embed": 1, "finalnorm": 1}


def test_tensor_info_holds_what_the_fork_computed(tmp_path):
    tensor = torch.randn(7, 5, dtype=torch.bfloat16)
    path = write_run(tmp_path / "run", [(record("embed/forward/output", tensor), tensor)])
    MEGATRON_PT.export(tensortap.open_run(path), tmp_path / "old", "*", lambda done: None)
    [file] = (tmp_path / "old").glob("*.pt")
    found, wide = load(file)["tensor_info"], tensor.double().numpy()
    assert found["dtype"] == "torch.bfloat16"
    assert found["mean"] == pytest.approx(wide.mean())
    assert found["std"] == pytest.approx(wide.std(ddof=1))
    assert (found["min"], found["max"]) == (wide.min(), wide.max())


def test_a_file_is_no_larger_than_its_tensor(tmp_path):
    big = torch.randn(1000, 100)
    items = [
        (record("embed/forward/output", t, n), t) for n, t in enumerate((big, big[:2].clone()))
    ]
    run = tensortap.open_run(write_run(tmp_path / "run", items))
    MEGATRON_PT.export(run, tmp_path / "old", "*", lambda done: None)
    sizes = sorted(path.stat().st_size for path in (tmp_path / "old").glob("*.pt"))
    assert sizes[0] < 800 + 5000
    assert sizes[1] < 400_000 + 5000


def test_records_without_values_are_counted_and_stay_known(cli, tmp_path):
    full = torch.ones(3)
    items = [(record("a/forward/x", full, 0), full)]
    items += [(record("b/forward/y", None, seq), None) for seq in (1, 2)]
    run = write_run(tmp_path / "run", items)
    code, out, _ = cli(
        "export", run, "--layout", "megatron-pt", "--out", tmp_path / "old", "--json"
    )
    assert code == 1
    moved = json.loads(out)
    assert (moved["records"], len(moved["skipped"])) == (1, 2)
    assert all(line.startswith("b/forward/y: statistics only") for line in moved["skipped"])
    cli("import", tmp_path / "old", "--layout", "megatron-pt", "--out", tmp_path / "back")
    code, out, _ = cli("coverage", tmp_path / "back")
    assert code == 1
    assert "b/forward/y: statistics only" in out


def test_an_interrupted_run_is_not_whole_after_export_and_import(tmp_path):
    run = rich_run(tmp_path / "run")
    (run / "rank00000" / "rank.json").unlink()
    opened = tensortap.open_run(run)
    assert opened.problems
    moved = MEGATRON_PT.export(opened, tmp_path / "old", "*", lambda done: None)
    assert any("exported as far as it goes" in line for line in moved.skipped)
    MEGATRON_PT.load(
        tmp_path / "old", tensortap.RunDirectorySink(tmp_path / "b"), lambda done: None
    )
    assert not tensortap.open_run(tmp_path / "b").complete


def split_run(path):
    """Two tensor-parallel ranks: a column split, a fused one with parts, a sum, a replica."""
    whole = torch.randn(5, 8)
    fused = torch.randn(6, 4)
    for rank in range(2):
        here = slice(4 * rank, 4 * rank + 4)
        column = Placement(logical_shape=(5, 8), segments={1: ((4 * rank, 4),)})
        parts = (Part("layers.0.mlp.gate", 0, ((0, 3),)), Part("layers.0.mlp.up", 0, ((3, 3),)))
        rows = {0: ((rank, 1), (2 + rank, 1), (4 + rank, 1))}
        gate_up = Placement(logical_shape=(6, 4), segments=rows, parts=parts)
        mine = fused[[rank, 2 + rank, 4 + rank]].contiguous()
        share = torch.full((3,), 1.0 + rank)
        pieces = [
            ("layers.0.attn.q/forward/output", whole[:, here].contiguous(), column),
            ("layers.0.mlp.gate_up/forward/weight", mine, gate_up),
            ("layers.0.attn.out/backward/grad_input_local", share, Placement(partial=("tp",))),
            ("layers.0.input_norm/forward/output", torch.ones(2), None),
        ]
        items = [
            (record(name, tensor, seq, rank=rank, placement=placement), tensor)
            for seq, (name, tensor, placement) in enumerate(pieces)
        ]
        parallel = {"tp": 2, "tp_rank": rank, "dp": 1, "dp_rank": 0}
        write_run(path, items, info(rank=rank, world_size=2, parallel=parallel))
    return path, {
        "layers.0.attn.q/forward/output": whole,
        "layers.0.mlp.gate/forward/weight": fused[:3],
        "layers.0.mlp.up/forward/weight": fused[3:],
        "layers.0.attn.out/backward/grad_input_local": torch.full((3,), 3.0),
        "layers.0.input_norm/forward/output": torch.ones(2),
    }


def test_two_ranks_come_back_and_assemble_the_same_logical_tensors(cli, tmp_path):
    run, expected = split_run(tmp_path / "run")
    assert cli("export", run, "--layout", "megatron-pt", "--out", tmp_path / "old")[0] == 0
    names = [
        sorted(path.name for path in folder.glob("*.pt"))
        for folder in (tmp_path / "old", tmp_path / "old" / "rank00001")
    ]
    assert names[0] == names[1]
    assert names[0][0].endswith("_0001_linear_L0_forward_fp32_output.pt")
    code, _, err = cli(
        "import", tmp_path / "old", "--layout", "megatron-pt", "--out", tmp_path / "back"
    )
    assert code == 0, err
    back = tensortap.open_run(tmp_path / "back")
    assert back.ranks == [0, 1]
    assert back.complete, back.problems
    assert_same_run(tensortap.open_run(run), back)
    for name, tensor in expected.items():
        assert torch.equal(back.tensor(name), tensor), name


def test_a_rank_of_which_nothing_was_selected_is_not_missed(tmp_path):
    for rank in range(2):
        made = record(f"layers.{rank}/forward/output", torch.ones(2), rank=rank)
        write_run(tmp_path / "run", [(made, torch.ones(2))], info(rank=rank, world_size=2))
    run = tensortap.open_run(tmp_path / "run")
    MEGATRON_PT.export(run, tmp_path / "old", "layers.1/*", lambda done: None)
    MEGATRON_PT.load(
        tmp_path / "old", tensortap.RunDirectorySink(tmp_path / "b"), lambda done: None
    )
    back = tensortap.open_run(tmp_path / "b")
    assert back.complete, back.problems
    assert back.names() == ["layers.1/forward/output"]


def test_any_other_sink_is_opened_once_with_the_records_of_all_ranks(tmp_path):
    run, _ = split_run(tmp_path / "run")
    MEGATRON_PT.export(tensortap.open_run(run), tmp_path / "old", "*", lambda done: None)
    sink = MemorySink()
    moved = MEGATRON_PT.load(tmp_path / "old", sink, lambda done: None)
    assert moved.records == len(sink.records) == 8
    assert [r.at.rank for r in sink.records] == [0, 1] * 4
    assert sink.closed


def test_ranks_of_different_runs_are_not_mixed(tmp_path):
    for launch, rank in (("one", 0), ("two", 1)):
        made = record("a/forward/x", torch.ones(1), rank=rank)
        path = write_run(tmp_path / launch, [(made, torch.ones(1))], info(launch, rank, 2))
        MEGATRON_PT.export(tensortap.open_run(path), tmp_path / f"{launch}-old", "*", print)
    (tmp_path / "two-old" / "rank00001").rename(tmp_path / "one-old" / "rank00001")
    with pytest.raises(RunError, match="mixes the ranks of several runs"):
        MEGATRON_PT.load(tmp_path / "one-old", MemorySink(), print)


def test_two_folders_of_one_rank_are_an_error(tmp_path):
    run = rich_run(tmp_path / "run")
    MEGATRON_PT.export(tensortap.open_run(run), tmp_path / "old", "embed*", print)
    shutil.copytree(tmp_path / "old", tmp_path / "old" / "rank00001")
    with pytest.raises(RunError, match="says it is of rank 0, as another does"):
        MEGATRON_PT.load(tmp_path / "old", MemorySink(), print)


def bare_folder(path, names):
    path.mkdir()
    tensors = []
    for counter, name in enumerate(names, start=1):
        tensors.append(torch.randn(3, 2))
        torch.save(tensors[-1], path / (STEM.format(counter, name) + ".pt"))
    return tensors


def test_bare_tensors_import_with_what_their_names_tell(cli, tmp_path):
    names = [
        "attention_L0_forward_hifp8_query", "attention_L0_forward_hifp8_output",
        "linear_L1_forward_hifp8_input", "linear_L1_forward_hifp8_input",
        "linear_L1_backward_hifp8_input", "linear_L1_backward_hifp8_grad_input",
    ]  # fmt: skip
    tensors = bare_folder(tmp_path / "old", names)
    code, _, err = cli(
        "import", tmp_path / "old", "--layout", "megatron-pt", "--out", tmp_path / "b"
    )
    assert code == 0, err
    run = tensortap.open_run(tmp_path / "b")
    assert [(str(r.name), r.at.call) for r in run.records()] == [
        ("layers.0.attn.core/forward/query", 0),
        ("layers.0.attn.core/forward/context", 0),
        ("layers.1.linear/forward/input", 0),
        ("layers.1.linear/forward/input", 1),
        ("layers.1.linear/backward/grad_output", 0),
        ("layers.1.linear/backward/grad_input", 0),
    ]
    for found, tensor, name in zip(run.records(), tensors, names, strict=True):
        assert torch.equal(run.piece(found), tensor)
        assert found.native.endswith(name)
        assert found.stats.mean == pytest.approx(tensor.double().numpy().mean())
    assert (run.info.format, run.info.created) == ("hifp8", "2025-09-08T09:21:56")
    assert "a backward is not paired with its forward" in cli("coverage", tmp_path / "b")[1]


def test_the_forks_own_dictionaries_import_like_bare_tensors(tmp_path):
    (tmp_path / "old").mkdir()
    tensor = torch.randn(2, 3, dtype=torch.bfloat16)
    fork = {
        "tensor": tensor,
        "tensor_info": {"shape": [2, 3], "requires_grad": True, "min": -1.0},
        "metadata": {"layer_type": "linear", "layer_idx": 1, "name": "mine", "save_time": "now"},
    }
    torch.save(fork, tmp_path / "old" / (STEM.format(5, "linear_L1_forward_mxfp8_weight") + ".pt"))
    sink = MemorySink()
    MEGATRON_PT.load(tmp_path / "old", sink, lambda done: None)
    [(found, payload)] = sink.find("layers.1.linear/forward/weight")
    assert same_bits(payload, tensor)
    assert (found.dtype, sink.run.format) == ("bfloat16", "mxfp8")


def test_bare_parameters_and_views_are_read_as_plain_tensors(tmp_path):
    (tmp_path / "old").mkdir()
    weight = torch.nn.Parameter(torch.randn(4, 3))
    saved = {"1": weight, "2": weight.detach().t(), "3": weight.detach()[1:]}
    for counter, tensor in saved.items():
        name = STEM.format(int(counter), "linear_L0_param_bf16_weight") + ".pt"
        legacy = counter == "3"
        torch.save(tensor, tmp_path / "old" / name, _use_new_zipfile_serialization=not legacy)
    sink = MemorySink()
    MEGATRON_PT.load(tmp_path / "old", sink, lambda done: None)
    for payload, tensor in zip(sink.payloads, saved.values(), strict=True):
        assert payload.is_contiguous()
        assert not payload.requires_grad
        assert torch.equal(payload, tensor.detach())


def test_a_mixed_folder_imports_the_bare_files_after_the_others(cli, tmp_path):
    run = rich_run(tmp_path / "run")
    MEGATRON_PT.export(tensortap.open_run(run), tmp_path / "old", "layers.*", lambda done: None)
    extra = torch.randn(4, 1, 2, 8)
    for counter, quant in ((1, "hifp8"), (2, "bf16")):
        name = STEM.format(counter, f"attention_L0_forward_{quant}_query")
        torch.save(extra * counter, tmp_path / "old" / f"{name}.pt")
    code, _, err = cli(
        "import", tmp_path / "old", "--layout", "megatron-pt", "--out", tmp_path / "b"
    )
    assert code == 0, err
    back = tensortap.open_run(tmp_path / "b")
    queries = list(back.records("layers.0.attn.core/forward/query"))
    assert [r.at.call for r in queries] == [0, 1, 2]
    assert torch.equal(back.piece(queries[2]), extra * 2)
    assert back.info.format == "mxfp4"  # as run.json says


def test_bare_files_follow_each_other_by_timestamp_and_counter(tmp_path):
    (tmp_path / "old").mkdir()
    stamps = ["20250908_100000_0001", "20250908_092156_12345", "20250908_092156_9999"]
    for value, stamp in enumerate(stamps):
        path = tmp_path / "old" / f"{stamp}_linear_L1_forward_bf16_input.pt"
        torch.save(torch.tensor(float(value)), path)
    sink = MemorySink()
    MEGATRON_PT.load(tmp_path / "old", sink, lambda done: None)
    assert [payload.item() for payload in sink.payloads] == [2.0, 1.0, 0.0]


def test_ranks_and_iterations_in_the_names_of_later_versions_are_coordinates(tmp_path):
    (tmp_path / "old").mkdir()
    for rank in (0, 1):
        name = f"20250908_092156_0001_iter004_linear_L1_forward_pre_linear_hifp8_rank0{rank}_input"
        torch.save(torch.full((2,), float(rank)), tmp_path / "old" / f"{name}.pt")
    MEGATRON_PT.load(
        tmp_path / "old", tensortap.RunDirectorySink(tmp_path / "b"), lambda done: None
    )
    run = tensortap.open_run(tmp_path / "b")
    assert (run.ranks, run.steps, run.complete) == ([0, 1], [4], True)
    for rank in (0, 1):
        found = run.tensor("layers.1.linear/forward/input", step=4, rank=rank)
        assert found.tolist() == [rank, rank]


class Evil:
    def __reduce__(self):
        return print, ("hacked",)


def good(path):
    torch.save(torch.ones(2), path)


def truncated(path):
    torch.save(torch.randn(1000), path)
    path.write_bytes(path.read_bytes()[:-300])


def flipped(path):
    made = record("a/forward/x", torch.ones(500))
    run = write_run(path.parent.parent / "r", [(made, torch.ones(500))])
    MEGATRON_PT.export(tensortap.open_run(run), path.parent / "e", "*", lambda done: None)
    [file] = (path.parent / "e").glob("*.pt")
    data = bytearray(file.read_bytes())
    at = data.index(torch.ones(50).numpy().tobytes()) + 77
    data[at] ^= 1
    path.write_bytes(data)


def relabelled(path):
    flipped(path)
    content = load(next((path.parent / "e").glob("*.pt")))
    content["tensor"] = content["tensor"].half()
    torch.save(content, path)


def misnamed(path):
    flipped(path)
    content = load(next((path.parent / "e").glob("*.pt")))
    content["metadata"]["name"] = "b/forward/x"
    torch.save(content, path)


def headless(path):
    flipped(path)
    content = load(next((path.parent / "e").glob("*.pt")))
    torch.save({key: content[key] for key in ("tensor", "tensor_info")}, path)


def newer(path):
    torch.save({"tensor": torch.ones(1), "metadata": {"tensortap": 2}}, path)


def endless(path):
    torch.save(torch.ones(1).expand(1 << 50), path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: torch.save({"tensor": Evil()}, path), "pickled code is never run"),
        (lambda path: path.write_bytes(b"not a tensor"), "cannot be imported"),
        (lambda path: path.write_bytes(b""), "cannot be imported"),
        (truncated, "cannot be imported"),
        (flipped, "its checksum differs"),
        (relabelled, "its tensor is float16 (500,), its metadata says float32 (500,)"),
        (misnamed, "its checksum differs"),
        (headless, "its metadata is missing"),
        (newer, "its metadata has version 2"),
        (endless, "cannot be imported"),
        (lambda path: torch.save({"weights": [1]}, path), "it holds no tensor"),
        (lambda path: torch.save(torch.ones(2).to_sparse(), path), "is not served"),
        (os.mkfifo, "is not a regular file"),
    ],
)
def test_a_file_that_cannot_be_served_is_named_and_no_code_of_it_runs(cli, tmp_path, make, says):
    (tmp_path / "old").mkdir()
    good(tmp_path / "old" / (STEM.format(1, "linear_L0_forward_bf16_input") + ".pt"))
    bad = tmp_path / "old" / (STEM.format(2, "linear_L0_forward_bf16_weight") + ".pt")
    make(bad)
    code, out, _ = cli(
        "import", tmp_path / "old", "--layout", "megatron-pt", "--out", tmp_path / "b"
    )
    assert code == 1
    assert bad.name in out
    assert says in " ".join(out.split())
    assert "hacked" not in out
    run = tensortap.open_run(tmp_path / "b")
    assert len(list(run.records())) == 1
    [gap] = run.coverage()["gaps"]
    assert gap["name"] == bad.name
    assert says in gap["reason"]


def test_a_folder_of_nothing_but_damaged_files_is_an_error_and_leaves_no_complete_run(
    cli, tmp_path
):
    (tmp_path / "old").mkdir()
    for number, make in enumerate((truncated, flipped)):
        folder = tmp_path / f"old{number}"
        folder.mkdir()
        bad = folder / (STEM.format(2, "linear_L0_forward_bf16_weight") + ".pt")
        make(bad)
        shutil.rmtree(folder / "e", ignore_errors=True)
        shutil.rmtree(tmp_path / "r", ignore_errors=True)
        target = tmp_path / f"b{number}"
        code, _, err = cli("import", folder, "--layout", "megatron-pt", "--out", target)
        assert code == 2
        assert bad.name in err
        assert not target.exists() or not tensortap.open_run(target).complete


def test_a_damaged_file_is_refused_or_gives_exactly_what_was_written(tmp_path):
    tensor = torch.randn(20, 3, dtype=torch.bfloat16)
    made = record("layers.0.attn.q/forward/output", tensor, dims="seq hidden", stats=statistics())
    run = tensortap.open_run(write_run(tmp_path / "run", [(made, tensor)]))
    MEGATRON_PT.export(run, tmp_path / "old", "*", lambda done: None)
    [file] = (tmp_path / "old").glob("*.pt")
    data, rng, refused = file.read_bytes(), random.Random(0), []
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged[: rng.choice([len(data), rng.randrange(len(data))])])
        sink = MemorySink()
        try:
            MEGATRON_PT.load(tmp_path / "old", sink, lambda done: None)
        except RunError as failure:
            refused.append(str(failure))
        else:
            assert sink.records == [made]
            assert same_bits(sink.payloads[0], tensor)
    assert 150 < len(refused) < 300
    assert all(file.name in reason for reason in refused)


def test_notes_that_a_script_adds_to_the_metadata_do_no_harm(tmp_path):
    run = rich_run(tmp_path / "run")
    MEGATRON_PT.export(tensortap.open_run(run), tmp_path / "old", "embed*", lambda done: None)
    [file] = (tmp_path / "old").glob("*.pt")
    content = load(file)
    content["metadata"]["seen_by"] = "me"
    torch.save(content, file)
    assert MEGATRON_PT.load(tmp_path / "old", MemorySink(), lambda done: None).records == 1


def test_a_file_whose_name_says_nothing_is_skipped_unless_it_says_it_all_itself(tmp_path):
    run = rich_run(tmp_path / "run")
    MEGATRON_PT.export(tensortap.open_run(run), tmp_path / "old", "embed*", lambda done: None)
    [file] = (tmp_path / "old").glob("*.pt")
    file.rename(tmp_path / "old" / "renamed.pt")
    sink = MemorySink()
    MEGATRON_PT.load(tmp_path / "old", sink, lambda done: None)
    assert sink.names() == ["embed/forward/output"]
    good(tmp_path / "old" / "other.pt")
    moved = MEGATRON_PT.load(tmp_path / "old", MemorySink(), lambda done: None)
    [reason] = moved.skipped
    assert re.match(r"other\.pt: has no metadata .* does not say what it is", reason)
    assert moved.records == 1


def test_a_folder_without_files_and_no_folder_at_all_are_errors(tmp_path):
    with pytest.raises(RunError, match=r"holds no \.pt files"):
        MEGATRON_PT.load(tmp_path, MemorySink(), lambda done: None)
    with pytest.raises(RunError, match="There is no folder"):
        MEGATRON_PT.load(tmp_path / "none", MemorySink(), lambda done: None)
    (tmp_path / "hifp8").mkdir()
    good(tmp_path / "hifp8" / (STEM.format(1, "linear_L0_forward_hifp8_input") + ".pt"))
    with pytest.raises(RunError, match="import its subfolders one by one: hifp8"):
        MEGATRON_PT.load(tmp_path, MemorySink(), lambda done: None)


def test_an_existing_folder_is_not_exported_into(cli, tmp_path):
    run = rich_run(tmp_path / "run")
    (tmp_path / "old").mkdir()
    good(tmp_path / "old" / "mine.pt")
    code, _, err = cli("export", run, "--layout", "megatron-pt", "--out", tmp_path / "old")
    assert (code, "exists" in err) == (2, True)
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["mine.pt"]


def test_the_layout_is_found_by_its_name():
    assert layout("megatron-pt") is MEGATRON_PT
