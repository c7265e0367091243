"""The command line: what it prints, how it exits, and one line for a user's mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch
from tests.core.models import Mlp

import tensortap
from tensortap import Part, Placement
from tensortap.names import TensorName
from tensortap.testing import example_record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "mlp"
    torch.manual_seed(0)
    model = Mlp().eval()
    with tensortap.attach(model, path, values={"up.*": "full", "up/*": "full"}):
        for _ in range(2):
            model(torch.randn(3, 8)).sum().backward()
    return path


def test_show_prints_a_row_for_each_record(cli, run):
    code, out, _ = cli("show", run)
    assert code == 0
    assert "Mlp" in out
    assert "complete" in out
    record = next(tensortap.open_run(run).records("up/forward/output", step=1))
    [row] = [line for line in out.splitlines() if line.split()[:2] == ["up/forward/output", "1"]]
    assert row.split()[2:4] == ["3x16", "float32"]
    assert row.split()[4:7] == [
        f"{getattr(record.stats, s):.4g}" for s in ("mean", "std", "absmax")
    ]


def test_show_narrows_and_says_how_much_it_left_out(cli, run):
    code, out, _ = cli("show", run, "--select", "up/*", "--step", 0, "--limit", 2)
    assert code == 0
    assert "… and " in out
    assert "down/" not in out


def test_show_never_cuts_a_number_in_a_narrow_terminal(cli, run, monkeypatch):
    wide = cli("show", run, "--select", "down/*")[1]
    monkeypatch.setenv("COLUMNS", "40")
    narrow = cli("show", run, "--select", "down/*")[1]
    assert narrow == wide
    assert all(heading in narrow for heading in ("absmax", "NaN", "Inf"))


def test_the_version_is_printed(cli):
    assert cli("--version")[1].strip() == f"tensortap {tensortap.__version__}"


def test_show_as_json(cli, run):
    code, out, _ = cli("show", run, "--json", "--select", "up/forward/output")
    shown = json.loads(out)
    assert code == 0
    assert shown["complete"]
    assert [tensor["step"] for tensor in shown["tensors"]] == [0, 1]


def test_the_name_of_a_part_shows_and_exports_the_tensor_it_is_cut_from(cli, tmp_path):
    whole = torch.randn(2, 24)
    parts = tuple(Part(f"layers.0.attn.{w}", 1, ((8 * n, 8),)) for n, w in enumerate("qkv"))
    name = TensorName("layers.0.attn.qkv", "forward", "output")
    record = replace(example_record(0, whole), name=name, placement=Placement((2, 24), parts=parts))
    sink = tensortap.RunDirectorySink(tmp_path / "run")
    sink.open(tensortap.RunInfo("launch", ""))
    sink.write(record, whole)
    sink.close()
    code, out, _ = cli("show", tmp_path / "run", "--select", "layers.0.attn.q/*")
    assert code == 0
    assert f"layers.0.attn.q/forward/output is a part of {name}" in out
    assert "layers.0.attn.k" not in out
    shown = json.loads(cli("show", tmp_path / "run", "--select", "*.attn.v/*", "--json")[1])
    assert shown["parts"] == {"layers.0.attn.v/forward/output": str(name)}
    assert [tensor["name"] for tensor in shown["tensors"]] == [str(name)]
    assert "is a part of" not in cli("show", tmp_path / "run")[1]
    assert (
        cli("export", tmp_path / "run", "--select", "*.attn.q/*", "--out", tmp_path / "pt")[0] == 0
    )
    assert len(list((tmp_path / "pt").glob("*.pt"))) == 1


def test_coverage_exits_with_one_on_a_gap_only(cli, run, tmp_path):
    code, out, _ = cli("coverage", run)
    assert code == 0
    assert "0 gaps" in out
    model = Mlp()
    with tensortap.attach(model, tmp_path / "gap", select="up/*,down/*"):
        model.up(torch.ones(1, 8))
    code, out, _ = cli("coverage", tmp_path / "gap")
    assert code == 1
    assert "down: selected, but never called" in out
    code, out, _ = cli("coverage", tmp_path / "gap", "--json")
    assert (code, json.loads(out)["gaps"][0]["name"]) == (1, "down")


def test_coverage_of_a_run_that_died_says_what_is_known(cli, run, tmp_path):
    died = tmp_path / "died"
    shutil.copytree(run, died)
    (died / "rank00000" / "coverage.json").unlink()
    code, out, _ = cli("coverage", died)
    whole = cli("coverage", run)[1]
    assert code == 1
    assert out.splitlines()[0] == whole.splitlines()[0]
    assert "what is missing is not known" in out


def test_notes_that_repeat_in_every_layer_are_one_line(cli, tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    model.forward = lambda x: model[0](x)
    with tensortap.attach(model, tmp_path / "run"):
        model(torch.ones(1, 2))
    out = cli("coverage", tmp_path / "run")[1]
    assert "  1: never called" in out or "(3 names): never called" in out


def test_an_imported_run_counts_its_records(cli, run, tmp_path):
    cli("export", run, "--out", tmp_path / "up", "--select", "up/*")
    cli("import", tmp_path / "up", "--out", tmp_path / "back")
    code, out, _ = cli("coverage", tmp_path / "back")
    assert code == 0
    assert out.startswith("14 records of 7 tensors in 2 step(s)")


def test_an_exported_folder_is_not_taken_for_a_run(cli, run, tmp_path):
    cli("export", run, "--out", tmp_path / "up", "--select", "up/*")
    code, _, err = cli("show", tmp_path / "up")
    assert code == 2
    assert "tensortap import" in err


def test_doctor_finds_everything_well(cli):
    code, out, _ = cli("doctor")
    assert code == 0
    for word in ("torch", "compiled kernel", "devices", "environment"):
        assert word in out


def test_doctor_names_a_broken_setting(cli, monkeypatch):
    monkeypatch.setenv("TENSORTAP_STEPS", "all of them")
    code, out, _ = cli("doctor", "--json")
    assert code == 1
    assert any("TENSORTAP_STEPS" in row["found"] for row in json.loads(out) if not row["fine"])


def test_recover_reports_and_leaves_a_whole_run_alone(cli, run):
    code, out, _ = cli("recover", run)
    assert code == 0
    assert out.strip()


def test_export_and_import_give_the_same_run_again(cli, run, tmp_path):
    code, out, _ = cli("export", run, "--out", tmp_path / "pt", "--layout", "pt")
    assert code == 1  # The statistics-only records cannot be exported, and are named.
    assert "and 29 more: statistics only; capture with values='full'" in out
    assert cli("export", run, "--out", tmp_path / "up", "--select", "up/*")[0] == 0
    assert cli("import", tmp_path / "up", "--out", tmp_path / "back")[0] == 0
    before, after = tensortap.open_run(run), tensortap.open_run(tmp_path / "back")
    assert after.names() == [name for name in before.names() if name.startswith("up/")]
    for record in before.records("up/*"):
        [same] = [r for r in after.records(str(record.name)) if r.at == record.at]
        assert same.stats == record.stats
        assert torch.equal(after.piece(same), before.piece(record))


def test_ranks_of_a_spread_run_are_exported_and_imported_apart(cli, tmp_path):
    """Two tensor-parallel ranks: the copy assembles to the same logical tensor."""
    piece = torch.arange(6.0).reshape(2, 3)
    for rank in (0, 1):
        parallel = {"tp": 2, "tp_rank": rank}
        info = tensortap.RunInfo("launch", "", rank=rank, world_size=2, parallel=parallel)
        placement = tensortap.Placement((4, 3), {0: ((2 * rank, 2),)})
        record = example_record(0, piece + 10 * rank)
        sink = tensortap.RunDirectorySink(tmp_path / "run")
        sink.open(info)
        at = replace(record.at, rank=rank)
        sink.write(replace(record, at=at, placement=placement), piece + 10 * rank)
        sink.end_step(0)
        sink.close()
    cli("export", tmp_path / "run", "--out", tmp_path / "pt")
    assert cli("import", tmp_path / "pt", "--out", tmp_path / "back")[0] == 0
    before, after = tensortap.open_run(tmp_path / "run"), tensortap.open_run(tmp_path / "back")
    assert after.ranks == [0, 1]
    [name] = before.names()
    expected = torch.cat([piece, piece + 10])
    assert torch.equal(before.tensor(name), expected)
    assert torch.equal(after.tensor(name), expected)


def test_a_pt_file_is_loadable_with_weights_only_and_holds_its_record(cli, run, tmp_path):
    cli("export", run, "--out", tmp_path / "pt", "--select", "up/forward/output")
    files = sorted((tmp_path / "pt").glob("*.pt"))
    content = torch.load(files[0], weights_only=True)
    assert content["record"]["name"] == "up/forward/output"
    assert content["tensor"].shape == (3, 16)
    assert files[0].stat().st_size < 10_000


def test_a_pt_file_that_runs_code_is_refused(cli, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("hacked",)

    (tmp_path / "evil").mkdir()
    torch.save({"tensor": Evil(), "record": {}}, tmp_path / "evil" / "00000_0_x.pt")
    code, out, err = cli("import", tmp_path / "evil", "--out", tmp_path / "run")
    assert code == 2
    assert "00000_0_x.pt is not a tensor file" in err
    assert "hacked" not in out


def _cut(path):
    path.write_bytes(path.read_bytes()[:500])


def _of_another_tensor(path):
    content = torch.load(path, weights_only=True)
    torch.save({**content, "tensor": content["tensor"][:1]}, path)


def _unnamed(path):
    path.rename(path.with_name("x.pt"))


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_cut, "is not a tensor file"),
        (_of_another_tensor, "its tensor is float32 (1, 8), its record float32 (3, 8)"),
        (_unnamed, "is not named <rank>_<seq>_<name>.pt"),
        (_fifo, "not a regular file"),
    ],
)
def test_a_broken_pt_file_does_not_lose_the_rest(cli, run, tmp_path, damage, says):
    cli("export", run, "--out", tmp_path / "pt", "--select", "up/forward/*")
    first, *rest = sorted((tmp_path / "pt").glob("*.pt"))
    damage(first)
    code, out, err = cli("import", tmp_path / "pt", "--out", tmp_path / "back")
    assert (code, err.strip()) == (1, "")
    assert "skipped" in out
    assert says in out
    with tensortap.open_run(tmp_path / "back") as back:
        assert sum(1 for _ in back.records()) == len(rest)
        assert not back.complete
    assert says in cli("coverage", tmp_path / "back")[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "nowhere"], "nowhere"),
        (["show", "{run}", "--select", "uup.*"], "Closest names: 'up/*'"),
        (["show", "{run}", "--select", "re:("], "not a regular expression"),
        (["coverage", "{tmp}"], "run"),
        (["recover", "nowhere"], "nowhere"),
        (["export", "{run}", "--out", "{run}"], "exists"),
        (["export", "{run}", "--out", "{tmp}/x", "--layout", "ptt"], "There is no layout 'ptt'"),
        (["import", "{tmp}", "--out", "{tmp}/x"], "holds no .pt files"),
        (["import", "{tmp}/no", "--out", "{tmp}/x"], "no"),
        (["shoow"], "No such command"),
        (["show", "{run}", "--step", 7], "no such record at step 7; its steps are [0, 1]"),
        (["show", "{run}", "--step", 7, "--rank", 0], "no such record at step 7 of rank 0;"),
        (["show", "{run}", "--rank", 5], "no rank 5"),
        (["export", "{run}", "--out", "/proc/none/x"], "/proc/none/x"),
        (["show", "{run}", "--step", "two"], "--step"),
    ],
)
def test_a_users_mistake_is_a_short_error_with_exit_code_2(cli, run, tmp_path, arguments, says):
    filled = [str(a).format(run=run, tmp=tmp_path) for a in arguments]
    code, _, err = cli(*filled)
    assert code == 2
    assert says in err


def test_a_command_of_core_does_not_wait_for_the_commands_of_plugins(tmp_path):
    """Some of them import much; `--help` lists them all."""
    program = (
        "import sys; from tensortap.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in sys.modules if m.startswith('tensortap_')])"
    )
    loaded = {}
    for word in ("show", "--help"):
        done = subprocess.run(
            [sys.executable, "-c", program, word],
            capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        loaded[word] = done.stdout.splitlines()[-1]
    assert "command" not in loaded["show"]
    plugins = {entry.value.split(":")[0] for entry in entry_points(group="tensortap.commands")}
    assert all(f"'{module}'" in loaded["--help"] for module in plugins)


def test_coverage_of_a_live_run_says_that_it_is_still_being_written(cli, tmp_path):
    with tensortap.attach(model := Mlp(), tmp_path / "live", on_error="raise") as tap:
        model(torch.randn(3, 8))
        tap.step()
        code, out, _ = cli("coverage", tmp_path / "live")
        assert code == 1
        assert "*: the run is still being written" in out
        assert "the process ended" not in out
    _, out, _ = cli("coverage", tmp_path / "live")
    assert "being written" not in out


def test_an_import_replaces_a_run_only_where_it_is_told_to(cli, run, tmp_path):
    cli("export", run, "--out", tmp_path / "pt", "--select", "up")
    again = "import", tmp_path / "pt", "--out", tmp_path / "back"
    assert cli(*again)[0] == 0
    code, _, err = cli(*again)
    assert code == 2
    assert "tensortap import: --overwrite" in err
    assert cli(*again, "--overwrite")[0] == 0
    assert cli("show", tmp_path / "back")[0] == 0


def test_an_unknown_layout_is_answered_with_all_that_there_are(cli, run, tmp_path):
    _, out, _ = cli("doctor", "--json")
    groups = (entry["what"] for entry in json.loads(out))
    known = [what.split()[-1] for what in groups if what.startswith("tensortap.layouts: ")]
    code, _, err = cli("export", run, "--out", tmp_path / "x", "--layout", "ptt")
    assert code == 2
    for name in ("pt", *known):
        assert f"'{name}'" in " ".join(err.split())
