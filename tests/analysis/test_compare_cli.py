"""`tensortap compare`: what it prints, and its exit codes."""

from __future__ import annotations

import csv
import io
import json
import shutil
from functools import partial

import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture_plain, noisy_output
from tests.core.store.building import info, record, write_run

from tensortap_analysis import compare
from tensortap_analysis.comparison.tables import tensors
from tensortap_analysis.rendering import likeness


@pytest.fixture
def compared(cli):
    """Run `tensortap compare ARGS`; returns (exit code, stdout, stderr)."""
    return partial(cli, "compare")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("runs"), PlainMlp()
    capture_plain(model, folder / "ref")
    capture_plain(model, folder / "same")
    capture_plain(model, folder / "bad", broken=[noisy_output("layers.2.up")])
    written = record("other/forward/output", torch.randn(3))
    write_run(folder / "alien", [(written, torch.randn(3))], info())
    return folder


def test_equal_runs_exit_0(compared, runs):
    code, out, _ = compared(runs / "ref", runs / "same")
    assert code == 0
    assert f"{runs / 'same'}: agrees" in out


def test_a_difference_exits_1_and_names_the_place(compared, runs):
    code, out, _ = compared(runs / "ref", runs / "bad")
    assert code == 1
    assert f"{runs / 'bad'}: differs beyond limits" in out
    assert "first divergence: layers.2.up/forward/output (step 0): relative error" in out
    assert "; local: 0.0" in out
    assert " added here; nothing it was computed from differs\n" in out
    assert "local errors (added there): layers.2.up/forward/output\n" in out
    assert "estimate" in out
    assert "differ\n" in out


def test_nothing_in_common_exits_2_and_warns_on_stderr(compared, runs):
    code, out, err = compared(runs / "ref", runs / "alien")
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
        (["--from", "x.json", "--noise", "ref"], "another one has to be measured"),
        (["ref", "same", "--step", "7"], "has no step 7; it has step 0."),
        (["ref", "same", "--step", "-1"], "has no step -1; it has step 0."),
        (["ref", "bad", "--noise", "bad"], "is the run that it is to judge"),
        (["ref", "same", "--save", "nodir/x.json"], "there is no directory nodir"),
        (["ref", "same", "--save", "/"], "is a directory; name a file"),
        (["ref", "same", "--save", "/proc/x.json"], "/proc/x.json cannot be written: "),
        (["ref", "same", "--threshold", "bhattacharyya=1"], "is a likeness, below 1"),
        (["--from", "x.json"], "no saved comparison at"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exits_2(compared, runs, arguments, says):
    known = ("ref", "same", "bad", "missing")
    code, out, err = compared(*(runs / word if word in known else word for word in arguments))
    assert code == 2
    assert out == ""
    assert says in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_json_says_all_that_the_terminal_says(compared, runs):
    code, out, _ = compared(runs / "ref", runs / "bad", "--json", "--limit", 0)
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


def test_csv_has_a_row_for_each_run_and_with_details_for_each_tensor(compared, runs):
    _, out, _ = compared(runs / "ref", runs / "same", runs / "bad", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["verdict"] for row in rows] == ["agree", "differ"]
    _, out, _ = compared(runs / "ref", runs / "same", runs / "bad", "--csv", "--details")
    tensors = list(csv.DictReader(io.StringIO(out)))
    assert len(tensors) == sum(int(row["compared"]) for row in rows)
    assert all(float(row["mse"]) == 0 for row in tensors if row["run"] == str(runs / "same"))


def test_markdown_is_tables_that_render_and_says_what_the_terminal_says(compared, runs):
    _, out, _ = compared(runs / "ref", runs / "bad", "--markdown", "--details", "--limit", 2)
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


def test_details_print_the_block_of_the_older_tools(compared, runs):
    name = "layers.4/forward/output"
    _, out, _ = compared(
        runs / "ref", runs / "bad", "--details", "--select", name, "--preset", "classic"
    )
    for word in ("REF  ", "RUN  ", "difference mean", "RMSE", "relative MSE", "%)", "correlation",
                 "50%", "90%", "95%", "99%", "judged", "SQNR"):  # fmt: skip
        assert word in out
    assert f"{name} (step 0), by values" in out


def test_limit_lists_the_worst_first_and_says_how_many_there_are(compared, runs):
    _, out, _ = compared(runs / "ref", runs / "bad", "--json")
    every = json.loads(out)["runs"][0]["tensors"]
    excess = [float(row["excess"]) for row in every]
    assert excess == sorted(excess, reverse=True)
    _, out, _ = compared(runs / "ref", runs / "bad", "--limit", 3)
    assert f"… the worst 3 of {len(every)} tensors" in out
    rows = [line for line in out.splitlines() if "rounding (estimate)" in line and "values" in line]
    assert len(rows) == 3
    assert every[0]["tensor"] in rows[0]
    assert "the worst first" in out
    _, out, _ = compared(runs / "ref", runs / "bad", "--limit", 0)
    assert "… the worst" not in out


def test_saved_and_judged_again_by_another_preset(compared, runs, tmp_path):
    code, _, _ = compared(runs / "ref", runs / "bad", "--save", tmp_path / "saved.json")
    assert code == 1
    code, out, _ = compared("--from", tmp_path / "saved.json", "--preset", "classic")
    assert code == 0
    assert "judged by classic" in out
    code, out, _ = compared("--from", tmp_path / "saved.json", "--threshold", "ratio=1e9")
    assert code == 0
    assert "ratio 1e+09" in out
    code, out, _ = compared("--from", tmp_path / "saved.json")
    assert code == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is not JSON"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "it is not JSON"),
        (b"{}", "is no saved comparison."),
        (b"[1]", "is no saved comparison."),
        (b'{"verdict": "agree", "summary": []}', "what --json prints; --save FILE keeps"),
        (b'{"kind": "tensortap-comparison", "schema": 9}', "its schema is 9, not 1"),
        (b'{"kind": "tensortap-comparison", "schema": 1}', "is no whole saved comparison"),
    ],
)
def test_a_file_that_is_no_saved_comparison_is_told_in_one_line(compared, tmp_path, content, says):
    (tmp_path / "x").write_bytes(content)
    code, out, err = compared("--from", tmp_path / "x")
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert len(err) < 250
    assert "Is a directory" in compared("--from", tmp_path)[2]


def test_a_saved_comparison_is_narrowed_by_name_and_step(compared, runs, tmp_path):
    saved = tmp_path / "saved.json"
    compared(runs / "ref", runs / "bad", "--save", saved)
    code, out, _ = compared("--from", saved, "--select", "layers.1.*/forward/*", "--json")
    assert code == 0
    names = {row["tensor"] for row in json.loads(out)["runs"][0]["tensors"]}
    assert names
    assert all(name.startswith("layers.1") for name in names)
    code, _, err = compared("--from", saved, "--select", "nope*")
    assert code == 2
    assert "matches nothing in the comparison" in err
    code, _, err = compared("--from", saved, "--step", 9)
    assert code == 2
    assert "Nothing was compared at step 9, only at step 0." in err
    assert compared("--from", saved, "--step", 0)[0] == 1


def test_what_is_saved_is_saved_after_it_was_printed_and_leaves_no_scratch(
    compared, runs, tmp_path
):
    _, out, _ = compared(runs / "ref", runs / "same", "--save", tmp_path / "saved.json")
    assert "agrees" in out
    assert [path.name for path in tmp_path.iterdir()] == ["saved.json"]


def test_a_pattern_that_matches_nothing_beside_others_is_warned_of(compared, runs):
    select = "layers.0/forward/output,layers.23/forward/output"
    code, _, err = compared(runs / "ref", runs / "same", "--select", select)
    assert code == 0
    assert "The pattern 'layers.23/forward/output' of the selection matches nothing" in err


def test_names_with_bars_and_newlines_break_no_table(compared, runs, tmp_path):
    odd = tmp_path / "a|b"
    shutil.copytree(runs / "bad", odd)
    _, out, _ = compared(runs / "ref", odd, "--markdown")
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert rows[2].replace("\\|", "").count("|") == rows[0].count("|")
    assert "a\\|b" in rows[2]


def test_details_are_of_as_many_tensors_as_the_limit(compared, tmp_path):
    x = torch.randn(5)
    rows = [(record("embed/forward/output", x, 0, step), x + step) for step in range(3)]
    ref = write_run(tmp_path / "ref", [(written, x) for written, x in rows])
    run = write_run(tmp_path / "run", [(written, x * 2) for written, x in rows])
    _, out, _ = compared(ref, run, "--details", "--limit", 2)
    assert out.count("embed/forward/output (step ") == 2 + 1  # and the first divergence


def test_a_table_leaves_out_what_a_narrow_terminal_has_no_room_for(runs):
    [run] = compare(runs / "ref", runs / "bad").runs
    least = max(map(len, tensors(run, limit=5, width=1).splitlines()[:-1]))
    for width in (80, 100, 140):
        text = tensors(run, limit=5, width=width)
        assert max(map(len, text.splitlines()[:-1])) <= max(width, least)
        assert text.splitlines()[-1].startswith("(no room for: by, MAE")
        assert "of limit" in text
    assert "no room" not in tensors(run, limit=5, width=300)
    assert "no room" not in tensors(run, limit=5)


def test_a_tensor_that_is_passed_on_is_listed_once_with_the_number_of_its_names(runs):
    [run] = compare(runs / "ref", runs / "bad").runs
    text = tensors(run)
    assert "layers.2.up/forward/output (and 1 more)" in text
    assert "layers.2.act/forward/input" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1.000000"), (1 - 3e-9, "1-3.0e-09"), (0.5, "0.500000"), (None, "-")]
)
def test_a_likeness_is_only_called_1_where_it_is(value, text):
    assert likeness(value) == text


def test_a_noise_run_is_named_and_judges(compared, runs):
    code, out, _ = compared(runs / "ref", runs / "bad", "--noise", runs / "same")
    assert code == 1
    assert f"(noise: {runs / 'same'})" in out
    assert "x the noise" in out


def test_help_lists_every_option(compared):
    code, out, _ = compared("--help")
    assert code == 0
    for word in ("--noise", "--preset", "--threshold", "--select", "--step", "--save", "--from",
                 "--details", "--limit", "--json", "--csv", "--markdown"):  # fmt: skip
        assert word in out
