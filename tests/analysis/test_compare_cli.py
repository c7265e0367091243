"""`tensortap compare`: what it prints, and its exit codes."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture_plain, noisy_output
from tests.core.store.building import info, record, write_run

from tensortap.cli import main


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `tensortap compare ARGS`; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["tensortap", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return stopped.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("runs"), PlainMlp()
    capture_plain(model, folder / "ref")
    capture_plain(model, folder / "same")
    capture_plain(model, folder / "bad", broken=[noisy_output("layers.2.up")])
    written = record("other/forward/output", torch.randn(3))
    write_run(folder / "alien", [(written, torch.randn(3))], info())
    return folder


def test_equal_runs_exit_0(cli, runs):
    code, out, _ = cli(runs / "ref", runs / "same")
    assert code == 0
    assert f"{runs / 'same'}: agrees" in out


def test_a_difference_exits_1_and_names_the_place(cli, runs):
    code, out, _ = cli(runs / "ref", runs / "bad")
    assert code == 1
    assert f"{runs / 'bad'}: differs beyond limits" in out
    assert "first divergence: layers.2.up/forward/output (step 0): relative error" in out
    assert "; local: 0.0" in out
    assert " added here; nothing it was computed from differs\n" in out
    assert "local errors (added there): layers.2.up/forward/output\n" in out
    assert "estimate" in out
    assert "differ\n" in out


def test_nothing_in_common_exits_2_and_warns_on_stderr(cli, runs):
    code, out, err = cli(runs / "ref", runs / "alien")
    assert code == 2
    assert "could not be compared" in out
    assert "only in RUN: other/forward/output: REF has no such tensor" in out
    assert "warning: " in err
    assert "nothing in common" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ref"], "a reference and a run"),
        ([], "a reference and a run"),
        (["ref", "missing"], "no run at"),
        (["ref", "same", "--preset", "best"], "no preset 'best'"),
        (["ref", "same", "--threshold", "ratio"], "is not NAME=VALUE"),
        (["ref", "same", "--threshold", "rato=1"], "no threshold 'rato'"),
        (["ref", "same", "--json", "--csv"], "choose one"),
        (["ref", "same", "--select", "nope"], "nope"),
        (["ref", "same", "--from", "x.json"], "not both"),
        (["--from", "x.json"], "no saved comparison at"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exits_2(cli, runs, arguments, says):
    known = ("ref", "same", "missing")
    code, out, err = cli(*(runs / word if word in known else word for word in arguments))
    assert code == 2
    assert out == ""
    assert says in err
    assert err.strip().startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_json_says_all_that_the_terminal_says(cli, runs):
    code, out, _ = cli(runs / "ref", runs / "bad", "--json", "--limit", 0)
    assert code == 1
    found = json.loads(out)
    assert found["verdict"] == "differ"
    [run] = found["runs"]
    assert run["first_divergence"]["tensor"] == "layers.2.up/forward/output"
    assert run["first_divergence"]["origin"] == "local"
    assert run["first_divergence"]["inputs"] == {
        f"layers.2.up/{what}": 0.0 for what in ("param/weight", "param/bias", "forward/input")
    }
    assert len(run["tensors"]) == found["summary"][0]["compared"]
    assert {"mse", "cosine", "sqnr_db", "p99", "d_mean", "grade"} <= run["tensors"][0].keys()
    assert "NaN" not in out


def test_csv_has_a_row_for_each_run_and_with_details_for_each_tensor(cli, runs):
    _, out, _ = cli(runs / "ref", runs / "same", runs / "bad", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["verdict"] for row in rows] == ["agree", "differ"]
    _, out, _ = cli(runs / "ref", runs / "same", runs / "bad", "--csv", "--details")
    tensors = list(csv.DictReader(io.StringIO(out)))
    assert len(tensors) == sum(int(row["compared"]) for row in rows)
    assert all(float(row["mse"]) == 0 for row in tensors if row["run"] == str(runs / "same"))


def test_markdown_is_tables_that_render_and_says_what_the_terminal_says(cli, runs):
    _, out, _ = cli(runs / "ref", runs / "bad", "--markdown", "--details", "--limit", 2)
    parts = out.strip().split("\n\n")
    tables = [part for part in parts if part.startswith("| ")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
        assert table.splitlines()[1].startswith("| --- |")
    summary, depth, tensors = tables
    assert len(summary.splitlines()) == 3
    assert len(depth.splitlines()) == 2 + 5
    assert len(tensors.splitlines()) == 2 + 2
    assert any(part.startswith("First divergence of") for part in parts)


def test_details_print_the_block_of_the_older_tools(cli, runs):
    name = "layers.4/forward/output"
    _, out, _ = cli(
        runs / "ref", runs / "bad", "--details", "--select", name, "--preset", "classic"
    )
    for word in ("REF  ", "RUN  ", "difference mean", "RMSE", "relative MSE", "%)", "correlation",
                 "50%", "90%", "95%", "99%", "judged", "SQNR"):  # fmt: skip
        assert word in out
    assert f"{name} (step 0), by values" in out


def test_limit_lists_the_worst_first_and_says_how_many_there_are(cli, runs):
    _, out, _ = cli(runs / "ref", runs / "bad", "--json")
    every = json.loads(out)["runs"][0]["tensors"]
    excess = [float(row["excess"]) for row in every]
    assert excess == sorted(excess, reverse=True)
    _, out, _ = cli(runs / "ref", runs / "bad", "--limit", 3)
    assert f"… the worst 3 of {len(every)} tensors" in out
    rows = [line for line in out.splitlines() if "rounding (estimate)" in line and "values" in line]
    assert len(rows) == 3
    assert every[0]["tensor"] in rows[0]
    assert "the worst first" in out
    _, out, _ = cli(runs / "ref", runs / "bad", "--limit", 0)
    assert "… the worst" not in out


def test_saved_and_judged_again_by_another_preset(cli, runs, tmp_path):
    code, _, _ = cli(runs / "ref", runs / "bad", "--save", tmp_path / "saved.json")
    assert code == 1
    code, out, _ = cli("--from", tmp_path / "saved.json", "--preset", "classic")
    assert code == 0
    assert "judged by classic" in out
    code, out, _ = cli("--from", tmp_path / "saved.json", "--threshold", "ratio=1e9")
    assert code == 0
    assert "ratio 1e+09" in out
    code, out, _ = cli("--from", tmp_path / "saved.json")
    assert code == 1


def test_a_noise_run_is_named_and_judges(cli, runs):
    code, out, _ = cli(runs / "ref", runs / "bad", "--noise", runs / "same")
    assert code == 1
    assert f"(noise: {runs / 'same'})" in out
    assert "x the noise" in out


def test_help_lists_every_option(cli):
    code, out, _ = cli("--help")
    assert code == 0
    for word in ("--noise", "--preset", "--threshold", "--select", "--step", "--save", "--from",
                 "--details", "--limit", "--json", "--csv", "--markdown"):  # fmt: skip
        assert word in out
