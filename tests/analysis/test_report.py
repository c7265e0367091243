"""The report: what is in the file, what it leaves out, and one line for a user's mistake."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tests.analysis.small_runs import PlainMlp, capture_plain, nan_output, noisy_output

import tensortap
from tensortap.cli import main
from tensortap.errors import ConfigError, RunError, SelectionError
from tensortap.records import decode_float
from tensortap_analysis import compare
from tensortap_analysis.captured import sources
from tensortap_analysis.comparison.tables import LAYERS, telling_layers
from tensortap_analysis.rendering import cell
from tensortap_analysis.report import write_report
from tensortap_analysis.report.figures import drawn, hover, logarithmic, whole
from tensortap_analysis.report.markup import data_block, tag
from tensortap_analysis.report.views import labels


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = PlainMlp()
    capture_plain(model, folder / "ref", metadata={"prompt": "one"})
    capture_plain(
        model, folder / "up", broken=[noisy_output("layers.2.up")], metadata={"prompt": "two"}
    )
    capture_plain(model, folder / "nan", broken=[nan_output("layers.3.down")], values="stats")
    return folder


@pytest.fixture
def cli(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["tensortap", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return stopped.value.code or 0, printed.out, printed.err

    return run


class Page(HTMLParser):
    """A report taken apart: its data, its text, and everything it refers to."""

    def __init__(self, path):
        super().__init__()
        self.data, self.words, self.references, self.policy, self._block = {}, "", [], "", None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        self.references += [given[key] for key in ("src", "href", "srcset", "data") if key in given]
        self._block = given.get("id") or name if name in ("script", "style") else None
        if "http-equiv" in given:
            self.policy = given["content"]

    def handle_endtag(self, name):
        self._block = None

    def handle_data(self, text):
        if self._block is None:
            self.words += text + "\n"
        elif self._block.endswith("-data"):
            self.data[self._block.removesuffix("-data")] = json.loads(text)

    def rows(self):
        keys = [column["key"] for column in self.data["tensors"]["columns"]]
        return [dict(zip(keys, row, strict=True)) for row in self.data["tensors"]["rows"]]


def test_the_table_holds_what_compare_measured(runs, tmp_path):
    write_report(tmp_path / "r.html", runs / "ref", runs / "up")
    found = {row["tensor"]: row for row in Page(tmp_path / "r.html").rows()}
    [run] = compare(runs / "ref", runs / "up").runs
    assert found.keys() == {pair.name for pair in run.pairs}
    for pair, judgement in zip(run.pairs, run.judgements, strict=True):
        row = found[pair.name]
        assert row["error"] == pytest.approx(pair.error, rel=1e-4)
        assert row["mae"] == pytest.approx(pair.metrics.mae, rel=1e-4)
        assert decode_float(row["excess"]) == pytest.approx(judgement.excess, rel=1e-4)
    assert {one.name: found[one.name]["origin"] for one in run.divergences} == {
        one.name: one.origin for one in run.divergences
    }


def test_the_chart_by_depth_shows_the_worst_error_of_each_layer(runs, tmp_path):
    write_report(tmp_path / "r.html", runs / "ref", runs / "up")
    [forward, _] = Page(tmp_path / "r.html").data["by-depth"]["data"]
    [run] = compare(runs / "ref", runs / "up").runs
    for layer, error in zip(forward["x"], forward["y"], strict=True):
        errors = [p.error for p in run.pairs if re.match(rf"layers\.{layer}[./].*forward", p.name)]
        assert (error or 0) == pytest.approx(max(errors))
    assert forward["y"][:2] == [None, None]


def test_what_goes_into_each_layer_and_what_it_adds_is_a_table(runs, tmp_path):
    write_report(tmp_path / "r.html", runs / "ref", runs / "up")
    words = Page(tmp_path / "r.html").words.split("\n")
    [run] = compare(runs / "ref", runs / "up").runs
    rows = telling_layers(run)
    assert [row["layer"] for row in rows] == [f"layers.{number}" for number in range(len(rows))]
    assert "Error by depth, step 0" in words
    for row in rows:
        start = words.index(row["layer"], words.index("Error by depth, step 0"))
        assert words[start : start + len(LAYERS)] == [cell(row[key]) for key in LAYERS]


def test_remarks_and_notes_of_the_comparison_are_in_the_report(runs, tmp_path):
    write_report(tmp_path / "r.html", runs / "ref", runs / "up", select="layers.*,nothing.here*")
    found = compare(runs / "ref", runs / "up", select="layers.*,nothing.here*")
    said = [*found.remarks, *found.runs[0].notes]
    assert found.remarks
    assert all(text in Page(tmp_path / "r.html").words for text in said)


def test_magnitudes_are_those_of_the_captured_values(runs, tmp_path):
    write_report(tmp_path / "r.html", runs / "ref")
    traces = Page(tmp_path / "r.html").data["magnitude-layer"]["data"]
    [forward] = [trace for trace in traces if trace["name"] == "forward"]
    with tensortap.open_run(runs / "ref") as run:
        for layer, rms in zip(forward["x"], forward["y"], strict=True):
            records = run.records(f"layers.{layer}/forward/*,layers.{layer}.*/forward/*")
            values = np.concatenate([run.piece(r).double().numpy().ravel() for r in records])
            assert rms == pytest.approx(np.sqrt(np.mean(values**2)), rel=1e-6)


def test_a_single_run_lists_its_statistics_with_nan_first(runs, tmp_path):
    done = write_report(tmp_path / "r.html", runs / "nan")
    rows = Page(tmp_path / "r.html").rows()
    assert done.verdict is None
    assert rows[0]["nan"] > 0
    bad = [bool(row["nan"] or row["inf"]) for row in rows]
    assert bad == sorted(bad, reverse=True)
    assert not all(bad)


def test_of_many_tensors_the_worst_are_listed_and_the_rest_is_counted(runs, tmp_path):
    done = write_report(tmp_path / "r.html", runs / "ref", runs / "up", runs / "nan", rows=10)
    page = Page(tmp_path / "r.html")
    found = compare(runs / "ref", runs / "up", runs / "nan")
    excess = [judgement.excess for run in found.runs for judgement in run.judgements]
    assert (done.tensors, done.listed) == (len(excess), 10)
    assert [decode_float(row["excess"]) for row in page.rows()] == pytest.approx(
        sorted(excess, reverse=True)[:10], rel=1e-4
    )
    assert f"The worst 10 of {len(excess):,}" in page.words


def test_twenty_thousand_tensors_make_a_small_page(tmp_path):
    with tensortap.attach(PlainMlp(depth=1), tmp_path / "run", phases=("forward",)) as tap:
        for number in range(20_000):
            tap.record(f"layers.{number % 700}.m{number // 700}/forward/x", torch.ones(1) * number)
    done = write_report(tmp_path / "r.html", tmp_path / "run", rows=1000)
    page = Page(tmp_path / "r.html")
    assert done.tensors == 20_000
    assert len(page.rows()) == 1000
    assert sum(len(json.dumps(block)) for block in page.data.values()) < 4_000_000


def test_the_file_refers_to_nothing_outside_itself(runs, tmp_path):
    write_report(tmp_path / "r.html", runs / "ref", runs / "up")
    page = Page(tmp_path / "r.html")
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert page.policy.startswith("default-src 'none'; script-src 'sha256-")


def test_what_runs_have_in_their_environment_stands_side_by_side(runs, tmp_path):
    write_report(tmp_path / "r.html", runs / "ref", runs / "up")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert '<tr class="differs"><th scope="row">prompt</th><td>one</td><td>two</td></tr>' in text
    assert f"<td>{torch.__version__}</td><td>{torch.__version__}</td>" in text
    assert '<th scope="row">world size</th><td>1</td><td>1</td>' in text


def test_a_noise_run_judges_as_in_compare(runs, tmp_path):
    noise = shutil.copytree(runs / "up", tmp_path / "again")
    done = write_report(tmp_path / "r.html", runs / "ref", runs / "up", noise=noise)
    assert done.verdict == "agree"
    assert "the noise run is" in Page(tmp_path / "r.html").words


def test_the_preset_and_its_thresholds_are_those_asked_for(runs, tmp_path):
    out, limits = tmp_path / "r.html", {"mse": 1e9, "correlation": 1e-9}
    done = write_report(
        out, runs / "ref", runs / "up", preset="classic", thresholds=limits
    )  # fmt: skip
    assert done.verdict == "agree"
    assert "mse 1e+09" in Page(out).words


def test_a_folder_of_another_tool_is_read_once_and_called_by_its_name(runs, tmp_path, monkeypatch):
    from tensortap.layouts import layout

    read = sources._imported
    with tensortap.open_run(runs / "ref") as run:
        layout("pt").export(run, tmp_path / "folder", "*", lambda done: None)
    imported = []
    monkeypatch.setattr(sources, "_imported", lambda *given: imported.append(given) or read(*given))
    done = write_report(tmp_path / "r.html", runs / "ref", tmp_path / "folder")
    assert done.verdict == "agree"
    assert done.runs == (str(runs / "ref"), str(tmp_path / "folder"))
    assert len(imported) == 1


def test_an_interrupted_run_is_reported_with_what_is_wrong(runs, tmp_path, cli):
    import shutil

    shutil.copytree(runs / "ref", tmp_path / "cut")
    (tmp_path / "cut/rank00000/coverage.json").unlink()
    with (tmp_path / "cut/rank00000/records.jsonl").open("r+") as lines:
        lines.seek(0, 2)
        lines.truncate(lines.tell() - 40)
    code, out, _ = cli(tmp_path / "cut", "--out", tmp_path / "r.html", "--json")
    told = json.loads(out)
    assert code == 1
    assert told["missing"]
    words = Page(tmp_path / "r.html").words
    assert "incomplete" in words
    assert all(line.removeprefix("cut is incomplete: ") in words for line in told["missing"])


def test_runs_with_nothing_in_common_make_a_report_that_says_so(runs, tmp_path, cli):
    with tensortap.attach(PlainMlp(), tmp_path / "other", phases=("forward",)) as tap:
        tap.record("elsewhere/forward/x", torch.ones(3))
    code, out, _ = cli(runs / "ref", tmp_path / "other", "--out", tmp_path / "r.html")
    assert code == 1
    assert "nothing in common" in out
    assert "could not be compared" in Page(tmp_path / "r.html").words


def test_values_that_cannot_be_read_any_more_are_missing(runs, tmp_path, cli):
    shutil.copytree(runs / "up", tmp_path / "damaged")
    [shard] = (tmp_path / "damaged/rank00000").glob("shard-*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    code, out, _ = cli(runs / "ref", tmp_path / "damaged", "--out", tmp_path / "r.html", "--json")
    told = json.loads(out)
    assert code == 1
    assert told["verdict"] != "agree"
    assert any("tensors could not be read" in line for line in told["missing"])


def test_a_run_without_coverage_is_not_called_complete(runs, tmp_path):
    shutil.copytree(runs / "ref", tmp_path / "cut")
    (tmp_path / "cut/rank00000/coverage.json").unlink()
    write_report(tmp_path / "r.html", tmp_path / "cut")
    words = Page(tmp_path / "r.html").words.split("\n")
    assert "coverage not known" in words
    assert "complete" not in words[words.index("Coverage") :]


def test_marks_of_a_chart_show_quotes_as_they_are_and_no_markup():
    assert hover(["layers.0.'a'\"b\"<i>&"]) == ["layers.0.'a'\"b\"&lt;i&gt;&amp;"]


def test_json_says_what_was_written(runs, tmp_path, cli):
    out = tmp_path / "r.html"
    code, printed, _ = cli(runs / "ref", runs / "up", "--out", out, "--rows", 7, "--json")
    told = json.loads(printed)
    assert code == 0
    assert told["out"] == str(out)
    assert told["bytes"] == out.stat().st_size
    assert (told["verdict"], told["listed"], told["missing"]) == ("differ", 7, [])
    assert told["runs"] == [str(runs / "ref"), str(runs / "up")]


def test_without_json_one_line_says_it(runs, tmp_path, cli):
    code, out, _ = cli(runs / "ref", "--out", tmp_path / "r.html")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'r.html'} (")
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{}/none"], "There is no run at"),
        (["{}/ref", "--out", "report.pdf"], "a report is an HTML file"),
        (["{}/ref", "--out", "nowhere/report.html"], "there is no directory"),
        (["{}/ref", "--noise", "{}/up"], "give a second run"),
        (["{}/ref", "--preset", "strict"], "strict"),
        (["{}/ref", "{}/up", "--threshold", "ratio"], "NAME=VALUE"),
        (["{}/ref", "--select", "layers.9.*"], "layers.9"),
        (["{}/ref", "--step", "7"], "ref; captured: step 0."),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    runs, tmp_path, cli, monkeypatch, arguments, says
):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*(word.format(runs) for word in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_target_is_refused_before_the_runs_are_read(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        (tmp_path / "d.html").mkdir()
        write_report(tmp_path / "d.html", tmp_path / "no run")


def test_python_callers_get_the_same_errors(runs, tmp_path):
    with pytest.raises(SelectionError):
        write_report(tmp_path / "r.html", runs / "ref", select="nobody/*/*")
    with pytest.raises(RunError):
        write_report(tmp_path / "r.html", runs / "missing")


def test_text_never_becomes_markup():
    hostile = "</script><b onclick='x'>&\x00\u202e"
    made = tag("p", hostile, title=hostile)
    assert re.findall(r"<[^>]*>", made)[-1] == "</p>"
    assert made.count("<") == 2
    assert "\\x00" in made
    block = data_block("x", {"name": hostile})
    assert block.count("<") == 2
    assert json.loads(block.split(">", 1)[1].rsplit("<", 1)[0]) == {"name": hostile}


def test_runs_are_called_by_what_tells_them_apart():
    assert labels(["a/b/fp32", "a/b/bf16"]) == ["fp32", "bf16"]
    assert labels(["x/1/run", "y/1/run"]) == ["x/1/run", "y/1/run"]
    assert labels(["same", "same"]) == ["same", "same"]


def test_an_axis_shows_zero_nowhere_and_infinity_on_top():
    assert drawn([0.0, math.nan, 0.5, math.inf], 10.0) == [None, None, 0.5, 10.0]
    low, high = logarithmic([1e-3, 1e-3])["range"]
    assert high - low >= 1
    assert low < -3 < high
    assert whole([2, 3])["dtick"] == 1
    assert whole(range(100))["dtick"] == 7


def test_infinite_errors_have_a_place_in_the_grid_of_layers(runs, tmp_path):
    write_report(tmp_path / "r.html", runs / "ref", runs / "nan")
    [heat] = Page(tmp_path / "r.html").data["grid-0"]["data"]
    place = heat["y"].index("down/forward/output")
    assert heat["text"][place] == ["", "", "", "∞", "∞"]
    assert [value is None for value in heat["z"][place]] == [True, True, True, False, False]


def test_other_commands_do_not_load_what_draws():
    code = (
        "import sys, tensortap_analysis.report.command, tensortap_analysis.plots.command, "
        "tensortap_analysis.whatif.command\n"
        "sys.exit(any(name in sys.modules for name in ('plotly', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
