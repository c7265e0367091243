"""What could not be compared is in the verdict, in the exit code, in a warning and in the table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math

import pytest
import torch
from safetensors.torch import save_file
from tests.analysis.small_runs import PlainMlp, capture_plain
from tests.core.store.building import info, record, write_run

from tensortap import open_run
from tensortap.records import Placement
from tensortap.stats import statistics
from tensortap.store import RunDirectorySink
from tensortap_analysis import compare

LAYER = "layers.{}/forward/output"
TP = [{"tp": 2, "tp_rank": rank} for rank in (0, 1)]


def run_of(path, tensors, step=0, **fields):
    items = [(record(n, t, seq, step), t) for seq, (n, t) in enumerate(tensors.items())]
    return write_run(path, items, info(**fields))


@pytest.fixture
def layers():
    return {LAYER.format(n): torch.randn(40, 40) for n in range(4)}


def shard(run):
    [found] = run.glob("rank00000/*.safetensors")
    return found


def test_replicas_that_disagree_are_a_difference(tmp_path):
    x = torch.randn(4, 6)
    drifted = x.clone()
    drifted[0] += 100
    place = Placement((4, 6))
    ref = run_of(tmp_path / "ref", {"a/forward/output": x, LAYER.format(0): x})
    rows = [
        [(record("a/forward/output", x, 0, placement=place, rank=rank), x),
         (record(LAYER.format(0), t, 1, placement=place, rank=rank), t)]
        for rank, t in enumerate((x, drifted))
    ]  # fmt: skip
    for rank, items in enumerate(rows):
        write_run(tmp_path / "run", items, info(rank=rank, world_size=2, parallel=TP[rank]))
    [run] = compare(ref, tmp_path / "run").runs
    assert run.verdict == "differ"
    [one] = run.of_kind("conflict")
    assert "disagree" in one.reason
    assert run.warnings[0].startswith(
        "1 of 2 tensors could not be compared: 1 of which ranks contradict each other"
    )


def test_shapes_that_do_not_match_are_a_difference(tmp_path, layers):
    ref = run_of(tmp_path / "ref", layers)
    run = run_of(tmp_path / "run", layers | {LAYER.format(1): torch.randn(9, 9)})
    [found] = compare(ref, run).runs
    assert found.verdict == "differ"
    assert found.first_divergence is None
    assert [one.kind for one in found.unpaired] == ["shape"]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_values_that_cannot_be_read_are_never_agreement(tmp_path, layers, damage, cli):
    ref, run = run_of(tmp_path / "ref", layers), run_of(tmp_path / "run", layers)
    content = bytearray(shard(run).read_bytes())
    if damage == "flipped":
        content[-100:-50] = b"x" * 50
        shard(run).write_bytes(content)
    elif damage == "truncated":
        shard(run).write_bytes(content[:-7000])
    else:
        shard(run).unlink()
    code, out, err = cli("compare", ref, run)
    assert code == 2
    [found] = compare(ref, run).runs
    assert found.verdict == "incomparable"
    lost = len(found.of_kind("damaged"))
    assert lost == {"flipped": 1, "truncated": 2, "missing": 4}[damage]
    assert "agrees" not in out
    assert f"cannot be read: {lost:,} tensors" in out
    if damage == "missing":
        assert "share 4 names, and not one tensor could be compared: " in err
    else:
        assert f"{lost} of 4 tensors could not be compared: {lost} lost or damaged" in err


def test_what_an_incomplete_run_lacks_is_lost(tmp_path, layers, cli):
    named = list(enumerate(layers.items()))
    rows = [(record(n, t, seq, step), t) for step in (0, 1) for seq, (n, t) in named]
    ref = write_run(tmp_path / "ref", rows)
    run = run_of(tmp_path / "run", layers)
    lines = run / "rank00000" / "records.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    (run / "rank00000" / "index.bin").unlink()
    code, out, err = cli("compare", ref, run)
    assert code == 2
    assert "cannot be judged (5 lost or damaged; 3 of 8 tensors compared)" in out
    assert "5 of 8 tensors could not be compared: 5 lost or damaged" in err
    assert "RUN is incomplete: " in err


def test_what_a_whole_run_lacks_is_counted_and_warned_of(tmp_path, layers, cli):
    ref = run_of(tmp_path / "ref", layers)
    half = run_of(tmp_path / "half", dict(list(layers.items())[:2]))
    code, out, err = cli("compare", ref, half)
    assert code == 0
    assert f"{half}: agrees (2 of 4 tensors compared)" in out
    assert "warning: 2 of 4 tensors could not be compared: 2 only in REF." in err
    [row] = csv.DictReader(io.StringIO(compare(ref, half).table("csv")))
    assert (row["compared"], row["not_compared"], row["verdict"]) == ("2", "2", "agree")


def test_what_only_the_run_has_besides_is_noted(tmp_path, layers):
    part = run_of(tmp_path / "part", dict(list(layers.items())[:2]))
    [run] = compare(part, run_of(tmp_path / "all", layers)).runs
    assert run.warnings == ()
    assert run.notes == ("2 tensors only in RUN; all of REF were compared",)


def test_every_format_says_what_was_not_compared(tmp_path, layers, cli):
    ref = run_of(tmp_path / "ref", layers)
    run = run_of(tmp_path / "run", layers | {LAYER.format(1): torch.randn(9, 9)})
    _, out, _ = cli("compare", ref, run, "--csv", "--details")
    last = list(csv.DictReader(io.StringIO(out)))[-1]
    assert (last["tensor"], last["by"]) == (LAYER.format(1), "not compared: shape")
    assert last["grade"] == "shapes 40x40 and 9x9 do not match"
    _, out, _ = cli("compare", ref, run, "--markdown")
    assert f"- not compared: {LAYER.format(1)}: shapes 40x40 and 9x9 do not match" in out
    _, out, _ = cli("compare", ref, run, "--json")
    [found] = json.loads(out)["runs"]
    assert (found["compared"], found["not_compared"]) == (3, 1)
    assert found["unpaired"][0]["kind"] == "shape"


def test_many_reasons_are_cut_and_counted(tmp_path, cli):
    tensors = {f"module{n:c}/forward/output": torch.randn(3) for n in range(ord("a"), ord("z"))}
    ref = run_of(tmp_path / "ref", {"embed/forward/output": torch.ones(1)} | tensors)
    run = run_of(tmp_path / "run", {"embed/forward/output": torch.ones(1)})
    _, out, _ = cli("compare", ref, run)
    assert out.count("  only in REF: module") == 8
    assert "  only in REF: and 17 more lines (--json has all)\n" in out


def test_statistics_agree_as_far_as_they_tell_and_that_is_said(tmp_path, layers, cli):
    def described(path, tensors):
        rows = [
            (record(n, None, seq, shape=tuple(t.shape), stats=statistics(t)), None)
            for seq, (n, t) in enumerate(tensors.items())
        ]
        return write_run(path, rows)

    ref, same = described(tmp_path / "ref", layers), described(tmp_path / "same", layers)
    shuffled = {n: torch.cat([t[:1], t[1:].flip(0)]) + 1e-6 for n, t in layers.items()}
    other = described(tmp_path / "other", shuffled)
    for arguments, code, words in (
        ((same,), 0, "agrees as far as statistics tell (4 tensors, by statistics)"),
        ((same, "--preset", "classic"), 0, "agrees as far as statistics tell"),
        ((other, "--preset", "classic"), 2, "cannot be judged (4 with statistics only;"),
        ((other, "--preset", "port"), 2, "cannot be judged (4 with statistics only;"),
    ):
        found, out, err = cli("compare", ref, *arguments)
        assert found == code
        assert words in out
        assert "warning: 4 of 4 tensors have statistics only" in err
    assert "This preset needs values" in err
    far = described(tmp_path / "far", {n: t + 5 for n, t in layers.items()})
    assert cli("compare", ref, far, "--preset", "port")[0] == 1


def test_runs_that_were_given_other_data_are_told_so(tmp_path):
    ids = torch.arange(8).reshape(1, 8)
    ref = run_of(tmp_path / "ref", {"root/forward/input": ids, LAYER.format(0): torch.randn(8, 4)})
    other = run_of(
        tmp_path / "other", {"root/forward/input": ids + 1, LAYER.format(0): torch.randn(8, 4)}
    )
    [run] = compare(ref, other).runs
    assert "The runs were given other data: root/forward/input differs." in run.warnings
    assert str(run.first_divergence).endswith("; the runs were given other data")
    assert run.judgements[0].grade == "integers differ"
    longer = run_of(
        tmp_path / "longer",
        {"root/forward/input": torch.arange(9).reshape(1, 9), LAYER.format(0): torch.randn(9, 4)},
    )
    [run] = compare(ref, longer).runs
    assert "The runs were given other data: root/forward/input differs." in run.warnings


def test_runs_that_equal_each_other_and_claim_different_modes_are_warned_of(tmp_path, layers):
    off = {name: tensor + 0.1 for name, tensor in layers.items()}
    ref = run_of(tmp_path / "fp32", layers, mode="fp32")
    one, two = (run_of(tmp_path / mode, off, mode=mode) for mode in ("0", "2-4"))
    same = run_of(tmp_path / "0-again", off, mode="0")
    found = compare(ref, one, same, two)
    [warning] = [w for run in found.runs for w in run.warnings if f"{one} claims" in w]
    assert f"{one} claims mode 0 and {two} claims mode 2-4" in warning
    assert "by the same numbers in all 4 tensors" in warning
    apart = run_of(tmp_path / "3", {n: t + 0.2 for n, t in layers.items()}, mode="3")
    assert not [w for run in compare(ref, one, apart).runs for w in run.warnings]


def test_a_nan_is_said_in_words(tmp_path, layers):
    name = LAYER.format(2)
    holed = layers[name].clone()
    holed[3, 3] = math.nan
    run = run_of(tmp_path / "run", layers | {name: holed})
    [found] = compare(run_of(tmp_path / "ref", layers), run).runs
    said = str(found.first_divergence)
    assert said.startswith(f"{name} (step 0): NaN or infinity on one side only; first seen here")
    assert "inf" not in said.replace("infinity", "")


def test_a_mask_of_another_shape_is_no_difference(tmp_path, layers):
    """transformers makes one for each sequence, Megatron one for all."""
    name = "layers.0/forward/input.attention_mask"
    ref = run_of(tmp_path / "ref", {**layers, name: torch.zeros(2, 1, 4, 4)})
    [run] = compare(ref, run_of(tmp_path / "run", {**layers, name: torch.zeros(1, 1, 4, 4)})).runs
    assert run.verdict == "agree"
    assert [one.name for one in run.of_kind("shape")] == [name]


def test_what_a_live_run_lacks_is_not_written_yet(tmp_path, cli):
    model = PlainMlp()
    ref = capture_plain(model, tmp_path / "ref")
    sink = RunDirectorySink(tmp_path / "live")
    with open_run(ref) as whole:
        sink.open(info())
        try:
            for known in list(whole.records())[:5]:
                sink.write(dataclasses.replace(known, payload=None), whole.piece(known).clone())
            sink.end_step(0)
            code, out, err = cli("compare", ref, tmp_path / "live")
        finally:
            sink.close()
    assert code == 2
    assert "not written yet" in out
    assert "not written yet" in err
    assert "lost or damaged" not in out + err


@pytest.mark.parametrize("command", ["compare", "formats", "report", "plot"])
@pytest.mark.parametrize("what", ["folder", "folder/model.safetensors"])
def test_a_checkpoint_is_sent_to_the_commands_that_read_it(tmp_path, cli, command, what):
    (tmp_path / "folder").mkdir()
    save_file({"w": torch.randn(3)}, tmp_path / "folder/model.safetensors")
    (tmp_path / "folder/config.json").write_text("{}")
    given = [tmp_path / what] * (2 if command == "compare" else 1)
    out = ["--out", tmp_path / "out.html"] if command in ("report", "plot") else []
    code, _, err = cli(command, *given, *out)
    assert code == 2
    said = " ".join(err.split())
    assert f"{tmp_path / what} is a checkpoint, not a run" in said
    assert "tensortap scan MODEL" in said
    assert "diff-weights" in said
    assert "layer-npy" not in said
