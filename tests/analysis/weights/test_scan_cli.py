import json
import shutil
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import save_file
from tests.analysis.weights.checkpoints import safetensors_folder, small_state

import tensortap
from tensortap.cli import app, main
from tensortap_analysis.weights import ScanResult, Scope, scanning

ONLY = [one for one in entry_points(group="tensortap.commands") if one.name == "scan"]


@pytest.fixture
def cli(monkeypatch, capsys):
    # Loading and describing every installed command takes longer than a small scan.
    monkeypatch.setattr("tensortap.cli.entry_points", lambda group: ONLY)
    before = list(app.registered_commands)

    def run(*arguments):
        monkeypatch.setattr(app, "registered_commands", list(before))
        monkeypatch.setattr("sys.argv", ["tensortap", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return stopped.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    state = small_state()
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 16)
    return safetensors_folder(tmp_path / "m", state, 2)


def test_a_scan_prints_a_row_a_layer_and_what_is_wrong(cli, folder):
    code, out, _ = cli("scan", folder)
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(" ")}
    assert rows["model.layers.0.mlp.down_proj"][1:3] == ["16x64", "float32"]
    assert "11 matrices, 4 vectors" in out
    assert "do not deploy" in out
    assert "critical model.layers.1.mlp.up_proj All its values are 0" in out
    assert "spectral: a vector has no spectrum" in out


def test_json_is_the_report_and_its_health(cli, folder):
    _, out, _ = cli("scan", folder, "--json", "--parallel", "2")
    document = json.loads(out)
    assert ScanResult.from_json(document) == Scope(folder).scan()
    assert document["source"] == str(folder)
    assert document["health"]["score"] == pytest.approx(59 * 10 / 11)
    [issue] = document["health"]["issues"]["critical"]
    assert issue["layer"] == "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [(("--parallel",), 0), (("--parallel", "3"), 3), (("--parallel=2",), 2), ((), 1)],
)
def test_parallel_alone_takes_all_cores_and_a_number_takes_so_many(
    cli, folder, monkeypatch, words, wanted
):
    seen = []
    real = Scope.scan

    def scan(self, *arguments, **options):
        seen.append(options["parallel"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(Scope, "scan", scan)
    for arguments in ((folder, *words), (*words, folder)):
        assert cli("scan", *arguments, "--methods", "norms")[0] == 0
    assert seen == [wanted] * 2


def test_a_checkpoint_may_be_called_by_a_number(cli, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.rename("200")
    assert cli("scan", "--parallel", "200", "--methods", "norms")[0] == 0
    assert cli("scan", "--parallel", "2", "200", "--methods", "norms")[0] == 0


def test_a_saved_report_is_judged_without_the_weights(cli, folder, tmp_path):
    report = tmp_path / "report.json"
    assert cli("scan", folder, "--output", report)[0] == 0
    shutil.rmtree(folder)
    code, out, _ = cli("scan", "--from", report, "--health", "--fail-on", "critical")
    assert code == 1
    assert "All its values are 0" in out
    assert "self_attn" not in out
    code, out, _ = cli("scan", "--from", report, "--health", "--preset", "classic", "--json")
    assert json.loads(out)["health"]["preset"] == "classic"


@pytest.mark.parametrize(
    ("severity", "code"), [("critical", 0), ("warning", 1), ("info", 1), (None, 0)]
)
def test_the_exit_code_is_1_from_the_severity_asked_for(cli, tmp_path, severity, code):
    x = torch.randn(40, 40)
    x[:, :10] = 0
    save_file({"x.weight": x}, tmp_path / "x.safetensors")
    words = ("--fail-on", severity) if severity else ()
    assert cli("scan", tmp_path / "x.safetensors", *words)[0] == code


def test_thresholds_can_be_replaced(cli, folder):
    _, out, _ = cli("scan", folder, "--preset", "classic", "--threshold", "condition_warning=1",
                    "--threshold", "condition_critical=2")  # fmt: skip
    assert "critical" in out
    assert "score 0 of 100" in out


def test_methods_and_selection_narrow_a_scan(cli, folder):
    _, out, _ = cli("scan", folder, "--methods", "norms", "--select", "lm_head")
    assert "1 matrix, 0 vectors" in out
    assert "condition" not in out.splitlines()[0]
    assert "Not judged, for it was not measured: spectral, quantization, sparsity." in out


def test_formats_can_be_chosen_and_all_singular_values_kept(cli, folder):
    _, out, _ = cli("scan", folder, "--formats", "mxfp4,int4", "--full-spectrum", "--json")
    layer = json.loads(out)["layers"]["lm_head"]
    assert set(layer["quantization"]["formats"]) == {"mxfp4", "int4"}
    assert len(layer["spectral"]["spectrum"]) == 16


def test_a_report_for_the_browser_is_written_from_weights_and_from_a_saved_scan(
    cli, folder, tmp_path
):
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    assert cli("scan", folder, "--output", report, "--html", page)[0] == 0
    assert "histogram-0" in page.read_text()
    assert cli("scan", "--from", report, "--html", tmp_path / "s.html")[0] == 0
    assert "histogram-0" not in (tmp_path / "s.html").read_text()


def test_limit_cuts_the_table_and_says_so(cli, folder):
    _, out, _ = cli("scan", folder, "--limit", "2")
    assert "… and 9 more layers: raise --limit." in out


def test_recommendations_are_json_for_llm_compressor(cli, folder):
    _, out, _ = cli("scan", folder, "--recommend", "quant", "--json", "--sqnr", "15")
    document = json.loads(out)
    assert {"config_groups", "ignore"} <= set(document)
    targets = [one for group in document["config_groups"].values() for one in group["targets"]]
    assert "model.layers.0.mlp.down_proj" in targets


def test_recommendations_are_among_the_formats_that_were_measured(cli, folder):
    _, out, _ = cli("scan", folder, "--recommend", "quant", "--json", "--sqnr", "15",
                    "--formats", "int8")  # fmt: skip
    assert {one["format"] for one in json.loads(out)["layers"].values()} == {"int8", None}


def test_a_finished_scan_of_another_model_is_not_replaced_unasked(cli, folder, tmp_path):
    report, other = tmp_path / "r.json", tmp_path / "other.safetensors"
    save_file({"x.weight": torch.randn(4, 4)}, other)
    for _ in range(2):
        assert cli("scan", folder, "--methods", "norms", "--output", report)[0] == 0
    before = report.read_bytes()
    code, _, error = cli("scan", other, "--output", report)
    assert (code, report.read_bytes()) == (2, before)
    assert f"is the scan of {folder}: save this one elsewhere, or pass --overwrite." in error
    assert cli("scan", other, "--output", report, "--overwrite")[0] == 0
    assert ScanResult.load(report).source == str(other)


def test_a_file_that_is_no_scan_is_not_replaced_unasked(cli, folder, tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    code, _, error = cli("scan", folder, "--output", tmp_path / "notes.json")
    assert (code, (tmp_path / "notes.json").read_text()) == (2, "{}")
    assert "exists and is no scan" in error


def test_what_is_no_saved_scan_is_told_in_one_short_line(cli, folder, tmp_path):
    for content in (
        b"\x80" * 9999,
        b"\x00" * 9999,
        b'{"kind": "' + b"x" * 9999 + b'", "schema": 1}',
    ):
        (tmp_path / "b.json").write_bytes(content)
        code, _, error = cli("scan", "--from", tmp_path / "b.json")
        assert (code, len(error) < 300, "is no saved scan" in error) == (2, True, True)
    assert "cannot be read: Is a directory" in cli("scan", "--from", folder)[2]
    (tmp_path / "d.json").write_text('{"steps": []}')
    assert "it lacks 'kind'" in cli("scan", "--from", tmp_path / "d.json")[2]


def test_recommendations_by_the_older_rules(cli, folder):
    _, out, _ = cli("scan", folder, "--recommend", "quant", "--preset", "classic", "--json")
    assert set(json.loads(out)) == {"int8_layers", "int16_layers", "fp16_layers"}
    code, out, _ = cli("scan", folder, "--recommend", "quant", "--preset", "classic")
    assert code == 0
    assert "fp16_layers" in out


def test_low_ranks_are_recommended_with_the_error_they_leave(cli, tmp_path):
    low = torch.randn(64, 4) @ torch.randn(4, 64)
    save_file({"low.weight": low, "full.weight": torch.randn(64, 64)}, tmp_path / "x.safetensors")
    _, out, _ = cli("scan", tmp_path / "x.safetensors", "--recommend", "compress")
    assert "low: rank 4 of 64" in out
    assert "full" not in out.replace("full rank", "")
    _, out, _ = cli("scan", tmp_path / "x.safetensors", "--recommend", "compress", "--json")
    assert [one["layer"] for one in json.loads(out)] == ["low"]


def test_names_from_a_file_cannot_command_the_terminal(cli, tmp_path):
    name = "a\x1b[31mb\x07[bold]c[/bold].weight"
    save_file({name: torch.randn(4, 4)}, tmp_path / "x.safetensors")
    _, out, _ = cli("scan", tmp_path / "x.safetensors")
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[bold]c[/bold]" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "scan needs one model"),
        (("absent/path",), "There is no file or folder absent/path"),
        (("{folder}", "--methods", "spectrl"), "there are all, spectral, quantization, sparsity,"),
        (("{folder}", "--select", "nothing"), "matches nothing"),
        (("{folder}", "--formats", "int9"), "int9"),
        (("{folder}", "--fail-on", "fatal"), "--fail-on fatal is none of critical"),
        (("{folder}", "--recommend", "prune"), "--recommend prune is none of quant, compress"),
        (("{folder}", "--threshold", "x"), "is not NAME=VALUE"),
        (("{folder}", "--preset", "clasic"), "no preset 'clasic'; there are default, classic."),
        (("{folder}", "--threshold", "sqnr_warn=3"), "closest: 'sqnr_warning'"),
        (("{folder}", "--threshold", "rank=nan"), "a number above 0"),
        (("{folder}", "--recommend", "quant", "--sqnr", "nan"), "--sqnr is a number of dB above 0"),
        (("{folder}", "--recommend", "quant", "--sqnr=-inf"), "--sqnr is a number of dB above 0"),
        (("{folder}", "--recommend", "quant", "--sqnr=-3"), "--sqnr is a number of dB above 0"),
        (("{folder}", "--recommend", "compress", "--error", "nan"), "--error is a share"),
        (("{folder}", "--recommend", "quant", "--methods", "norms"), "needs --methods quantiz"),
        (("{folder}", "--output", "{folder}/no/r.json"), "there is no directory"),
        (("{folder}", "--html", "r.txt"), "a report is an HTML file"),
        (("{folder}", "--from", "r.json"), "give either it or a model"),
        (("--from", "r.json", "--select", "x*"), "--select needs the model"),
        (("--from", "r.json", "--methods", "norms", "--output", "o"), "--methods, --output needs"),
        (("{folder}", "--output", "{folder}"), "is a directory; name a file"),
        (("--from", "{folder}/absent.json"), "no saved scan at"),
        (("{folder}", "{folder}"), "scan needs one model"),
        (("{folder}", "--output", "/proc/x.json"), "--output /proc/x.json cannot be written: "),
        (("{folder}", "--output", "/dev/full"), "that is no file"),
        (("--from", "/dev/zero"), "it is a device"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cli, folder, monkeypatch, arguments, words):
    monkeypatch.setattr(scanning, "measured", lambda *_: pytest.fail("work came before the check"))
    code, out, error = cli("scan", *(word.format(folder=folder) for word in arguments))
    assert (code, out) == (2, "")
    assert words in error
    assert len(error.strip().splitlines()) == 1


def quantised(tmp_path):
    torch.manual_seed(0)
    state = {f"layers.0.{word}_proj.weight": torch.randn(64, 256) for word in "qkvo"}
    state["layers.0.q_proj.weight"][:, 3] = 45
    save_file(state, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_advice_names_the_sibling_that_decides(cli, tmp_path):
    _, out, _ = cli("scan", quantised(tmp_path), "--recommend", "quant", "--sqnr", "40")
    lines = {line.split(":")[0].strip(): line for line in out.splitlines() if "_proj" in line}
    assert "no format keeps 40 dB: mxfp8 leaves" in lines["layers.0.q_proj"]
    for word in "kv":
        assert "as it is (goes with q_proj:" in lines[f"layers.0.{word}_proj"]
    assert "int8" in lines["layers.0.o_proj"]


def test_advice_is_among_the_formats_that_were_asked_for(cli, tmp_path):
    model = quantised(tmp_path)
    found = cli(
        "scan", model, "--recommend", "quant", "--formats", "mxfp4", "--sqnr", "15", "--json"
    )
    assert set(json.loads(found[1])["config_groups"]) == {"mxfp4"}
    code, _, err = cli("scan", model, "--recommend", "quant", "--formats", "hifp8")
    assert code == 2
    assert "chooses among int8, int4, mxfp8, mxfp4, nvfp4" in err


def test_classic_advice_leaves_out_what_would_lose_too_much_and_says_so(cli, tmp_path):
    torch.manual_seed(0)
    save_file({"spike.weight": torch.randn(64, 64) + 8}, tmp_path / "x.safetensors")
    words = ("--recommend", "compress", "--preset", "classic")
    _, out, _ = cli("scan", tmp_path / "x.safetensors", *words)
    assert out.strip() == (
        "1 layer more would lose over 10% of the norm by the guide's rank; --error 0.99 shows them."
    )
    _, out, _ = cli("scan", tmp_path / "x.safetensors", *words, "--error", "0.99")
    assert "spike: LoRA of rank 4" in out


def test_one_layer_bears_and_none_is_said(cli, tmp_path):
    torch.manual_seed(0)
    low = torch.randn(64, 4) @ torch.randn(4, 64)
    save_file({"low.weight": low, "fine.weight": torch.randn(64, 64)}, tmp_path / "x.safetensors")
    _, out, _ = cli("scan", tmp_path / "x.safetensors", "--recommend", "compress")
    assert "1 layer bears a low rank" in out
    _, out, _ = cli(
        "scan", tmp_path / "x.safetensors", "--recommend", "compress", "--select", "fine"
    )
    assert "No layer bears a low rank with an error of 10% of its norm." in out


def interrupting(monkeypatch, after):
    real, calls = scanning.measured, []

    def measured(*arguments):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(scanning, "measured", measured)


def test_an_interrupted_scan_says_what_is_kept_and_the_next_one_what_it_took_over(
    cli, folder, tmp_path, monkeypatch
):
    report = tmp_path / "r.json"
    with monkeypatch.context() as patched:
        interrupting(patched, 5)
        code, out, error = cli("scan", folder, "--output", report)
    journal = f"{report}.journal"
    assert (code, out) == (130, "")
    assert error.strip() == (
        f"interrupted: 5 weights are kept in {journal}; the same command goes on from there."
    )
    code, _, error = cli("scan", folder, "--output", report)
    assert code == 0
    assert f"goes on: 5 of 15 weights are in {journal} already" in error
    assert f"wrote {report}" in error
    assert ScanResult.load(report) == Scope(folder).scan()
    assert "goes on" not in cli("scan", folder, "--output", report)[2]


def test_an_interrupted_scan_without_output_says_how_to_keep_it(cli, folder, monkeypatch):
    interrupting(monkeypatch, 3)
    code, _, error = cli("scan", folder)
    assert code == 130
    assert "nothing is kept; with --output FILE" in error


def test_patterns_that_match_nothing_are_warned_of_and_the_closest_layers_named(cli, folder):
    code, _, error = cli("scan", folder, "--select", "model.layers.1.*,model.layers.9.*")
    assert code == 0
    assert "the pattern 'model.layers.9.*' matches nothing in" in error
    code, _, error = cli("scan", folder, "--select", "model.layers.9.mlp.up_proj")
    assert code == 2
    assert "Closest layers: 'model.layers." in error
    assert "/" not in error.split("Closest layers")[1]


def test_a_run_is_not_a_checkpoint_and_it_is_said_what_to_do(cli, tmp_path):
    with tensortap.attach(torch.nn.Linear(4, 4), tmp_path / "run") as tap:
        tap.record("x/forward/y", torch.ones(3))
    code, _, error = cli("scan", tmp_path / "run")
    assert code == 2
    assert "is a run of tensortap, not a checkpoint" in error
    assert "tensortap show" in error


def test_files_without_a_suffix_are_read_by_their_beginning(cli, tmp_path):
    save_file({"x.weight": torch.randn(8, 8)}, tmp_path / "model")
    assert list(Scope(tmp_path / "model").scan("norms")) == ["x"]
    for text in ("just some text in a file", "{", ""):
        (tmp_path / "text").write_text(text)
        code, _, error = cli("scan", tmp_path / "text")
        assert code == 2
        assert "Checkpoints are .safetensors files" in error
        assert "Error" not in error
