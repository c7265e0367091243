"""tensortap diff-weights, as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from tensortap.cli import main

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tensortap", "diff-weights", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        return int(stopped.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Path]:
    """Four steps; the second layer grows by 1.7 at each, the others move a little."""
    weights = {f"model.layers.{at}.mlp.up_proj.weight": torch.randn(24, 16) for at in range(5)}
    weights["model.norm.weight"] = torch.ones(16)
    paths = []
    for step in range(4):
        paths.append(tmp_path / f"step{step}.safetensors")
        save_file(weights, paths[-1])
        weights = {name: w + 0.01 * torch.randn_like(w) for name, w in weights.items()}
        weights["model.layers.1.mlp.up_proj.weight"] *= 1.7
    return paths


def test_two_checkpoints_are_a_row_a_layer(cli: Cli, checkpoints: list[Path]) -> None:
    code, out, _ = cli(*checkpoints[:2])
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(" ")}
    assert rows["model.layers.1.mlp.up_proj"][1:3] == ["24x16", "70.0%"]
    assert rows["model.norm"][1] == "16"
    assert "1 alert\n" in out
    assert "warning model.layers.1.mlp.up_proj It changed by 0.7 of its norm" in out


def test_many_checkpoints_are_a_trend_with_what_only_the_whole_shows(
    cli: Cli, checkpoints: list[Path]
) -> None:
    code, out, _ = cli(*checkpoints, "--parallel", "2")
    assert code == 0
    row = next(line for line in out.splitlines() if "layers.1.mlp" in line).split()
    assert row[1:4] == ["70.0%", "70.0%", "70.0%"]
    assert float(row[4]) == pytest.approx(1.7**3, rel=0.01)
    over_all = out.split("over all steps")[1]
    assert "model.layers.1.mlp.up_proj Its norm is 4.91 times what it was" in over_all


def test_json_and_the_saved_file_hold_everything(
    cli: Cli, checkpoints: list[Path], tmp_path: Path
) -> None:
    saved = tmp_path / "drift.json"
    _, out, _ = cli(*checkpoints, "--json", "--output", saved)
    document = json.loads(out)
    assert document == json.loads(saved.read_text())
    assert len(document["steps"]) == 3
    found = document["steps"][0]["layer_comparisons"]["model.layers.1.mlp.up_proj"]
    assert found["l2_norm_ratio"] == pytest.approx(1.7, rel=1e-3)
    assert [issue["rule"] for issue in document["steps"][0]["alerts"]] == ["peers"]
    assert [issue["rule"] for issue in document["overall"]] == ["explosion"]


def test_the_exit_code_is_one_where_it_was_asked_for(cli: Cli, checkpoints: list[Path]) -> None:
    assert cli(*checkpoints[:2], "--fail-on", "warning")[0] == 1
    assert cli(*checkpoints[:2], "--fail-on", "critical")[0] == 0
    strict = ("--fail-on", "critical", "--threshold", "explosion=1.5", "--threshold", "ratio=1.2")
    assert cli(*checkpoints[:2], *strict)[0] == 1
    assert cli(*checkpoints[:2], "--threshold", "peers=1000", "--fail-on", "info")[0] == 0


def test_spectra_can_be_left_out(cli: Cli, checkpoints: list[Path]) -> None:
    with_spectra, without = (cli(*checkpoints[:2], word)[1] for word in
                             ("--spectral", "--no-spectral"))  # fmt: skip
    assert "spectral ratio" in with_spectra
    assert "spectral ratio" not in without


def test_the_picture_is_drawn(cli: Cli, checkpoints: list[Path], tmp_path: Path) -> None:
    for count, words in ((4, ()), (2, ("--no-spectral",))):
        path = tmp_path / f"{count}.png"
        assert cli(*checkpoints[:count], "--plot", path, *words)[0] == 0
        picture = imread(path)
        assert picture.shape[0] > 300
        assert picture[..., :3].std() > 0.02


def test_what_is_typed_wrongly_is_one_line(
    cli: Cli, checkpoints: list[Path], tmp_path: Path
) -> None:
    one, two = checkpoints[:2]
    # What is read would be the first to be complained of.
    none, foreign = tmp_path / "none", tmp_path / "config.json"
    foreign.write_text('{"model_type": "gpt2"}')
    for words, said in (
        ((one,), "needs two checkpoints"),
        ((one, tmp_path / "none"), "no file or folder"),
        ((one, two, "--plot", "drift.jpg"), "must end in .png"),
        ((one, none, "--plot", tmp_path / "no" / "d.png"), "there is no directory"),
        ((one, none, "--html", "d.txt"), "must end in .html or .htm"),
        ((one, none, "--output", tmp_path / "no" / "d.json"), "there is no directory"),
        ((one, none, "--output", tmp_path), "must end in .json"),
        ((one, none, "--output", two), "must end in .json"),
        ((one, none, "--output", foreign), "is no drift"),
        ((one, none, "--threshold", "ratio=nan"), "number above 0"),
        ((one, none, "--threshold", "ratio=inf"), "number above 0"),
        ((one, none, "--threshold", "ratio=-3"), "number above 0"),
        ((one, none, "--preset", "clasic"), "there are classic, default"),
        ((one, two, "--fail-on", "bad"), "none of critical, warning, info"),
        ((one, two, "--threshold", "explosion"), "NAME=VALUE"),
        ((one, two, "--threshold", "boom=2"), "no threshold 'boom'"),
        ((one, two, "--preset", "old"), "no preset 'old'"),
        ((one, two, "--select", "nothing.*"), "nothing.*"),
    ):
        code, out, err = cli(*words)
        assert (code, out) == (2, "")
        assert said in " ".join(err.split())


def test_a_saved_drift_is_replaced_by_a_whole_one(
    cli: Cli, checkpoints: list[Path], tmp_path: Path
) -> None:
    saved = tmp_path / "drift.json"
    assert cli(*checkpoints[:2], "--output", saved)[0] == 0
    assert cli(*checkpoints[:3], "--output", saved)[0] == 0
    document = json.loads(saved.read_text())
    assert (document["kind"], len(document["steps"])) == ("tensortap-drift", 2)
    assert [path.name for path in tmp_path.glob("drift*")] == ["drift.json"]


def test_alerts_that_say_the_same_are_one_line(cli: Cli, checkpoints: list[Path]) -> None:
    code, out, _ = cli(checkpoints[0], checkpoints[0], "--fail-on", "warning")
    assert code == 0
    (line,) = (line for line in out.splitlines() if "Not one of its values" in line)
    assert line.startswith("  info model.layers.0.mlp.up_proj and 5 more Not one")
    assert "are they the same checkpoint?" in out


def test_a_weight_that_began_at_zero_has_no_share_that_it_changed_by(
    cli: Cli, tmp_path: Path
) -> None:
    for name, weight in (("a", torch.zeros(8, 8)), ("b", torch.randn(8, 8) * 0.01)):
        save_file(
            {"q.lora_B.weight": weight, "q.weight": torch.eye(8)}, tmp_path / f"{name}.safetensors"
        )
    _, out, _ = cli(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    row = next(line for line in out.splitlines() if line.startswith(" q.lora_B"))
    assert row.split()[2:6] == ["from", "0", "from", "0"]
    assert "It was all zeros and began to learn." in out


def test_changes_of_many_times_are_told_as_times(cli: Cli, tmp_path: Path) -> None:
    for name, factor in (("a", 1), ("b", 1126)):
        save_file({"q.weight": torch.eye(8) * factor}, tmp_path / f"{name}.safetensors")
    _, out, _ = cli(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert out.splitlines()[1].split()[2] == "1,125x"


def test_checkpoints_in_another_order_than_their_numbers_are_said_to_be(
    cli: Cli, checkpoints: list[Path], tmp_path: Path
) -> None:
    html = tmp_path / "d.html"
    one, two, three = checkpoints[:3]
    _, out, _ = cli(one, three, two, "--html", html)
    assert "not in the order of their numbers" in out
    assert "not in the order of their numbers" in html.read_text()
    assert "order of their numbers" not in cli(one, two, three)[1]
    document = json.loads(cli(two, one, "--json")[1])
    assert "not in the order" in document["notes"][0]


def test_checkpoints_of_other_models_are_told_apart(
    cli: Cli, checkpoints: list[Path], tmp_path: Path
) -> None:
    def saved(name: str, **weights: torch.Tensor) -> Path:
        save_file(weights, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    name = "model.layers.0.mlp.up_proj.weight"
    foreign = saved("foreign", **{"h.0.weight": torch.ones(4, 4)})
    for paths in ((checkpoints[0], foreign), (*checkpoints[:2], foreign)):
        code, out, err = cli(*paths)
        assert (code, out) == (2, "")
        assert "No weight is in both" in err
        assert "foreign.safetensors (h.0.weight" in " ".join(err.split())
    code, _, err = cli(checkpoints[0], saved("wide", **{name: torch.ones(48, 16)}))
    assert code == 2
    assert "model.layers.0.mlp.up_proj was 24x16 and is 48x16" in " ".join(err.split())
    few = cli(checkpoints[0], saved("few", **{name: torch.ones(24, 16)}))[1]
    assert "Only 1 of 6 weights are in both" in few


def test_patterns_that_match_nothing_and_files_that_were_written_are_named(cli, tmp_path):
    for name in "ab":
        state = {"q.weight": torch.randn(8, 8), "k.weight": torch.randn(8, 8)}
        save_file(state, tmp_path / f"{name}.safetensors")
    both = [tmp_path / f"{name}.safetensors" for name in "ab"]
    code, _, error = cli(*both, "--select", "q,nope.*", "--output", tmp_path / "d.json")
    assert code == 0
    assert "the pattern 'nope.*' matches nothing in" in error
    assert f"wrote {tmp_path / 'd.json'}" in error


def test_the_most_changed_layer_comes_first_and_columns_say_what_they_are(
    cli: Cli, checkpoints: list[Path]
) -> None:
    for some in (checkpoints[:2], checkpoints):
        lines = cli(*some, "--limit", "1")[1].splitlines()
        heading = next(at for at, line in enumerate(lines) if line.strip().startswith("layer"))
        assert "layers.1.mlp" in lines[heading + 1]
        assert "change" in lines[heading]
    for name in ("step1", "step2", "step3"):
        assert f"change to {name}" in lines[heading]
    assert "norm, last / first" in lines[heading]


def test_the_way_back_to_health_is_no_second_accident(cli: Cli, tmp_path: Path) -> None:
    good = {f"layers.{n}.q.weight": torch.randn(32, 32) / 6 for n in range(5)}
    paths = [tmp_path / f"step{n}.safetensors" for n in range(3)]
    moved = {name: one + 0.01 * torch.randn_like(one) for name, one in good.items()}
    sick = moved | {"layers.2.q.weight": moved["layers.2.q.weight"] * 50}
    healed = {name: one + 0.01 * torch.randn_like(one) for name, one in moved.items()}
    for path, state in zip(paths, (good, sick, healed), strict=True):
        save_file(state, path)
    document = json.loads(cli(*paths, "--json")[1])
    first, second = (step["alerts"] for step in document["steps"])
    assert [(one["rule"], one["severity"]) for one in first] == [("explosion", "critical")]
    assert [(one["rule"], one["severity"]) for one in second] == [("return", "info")]
    assert "before the last step" in second[0]["cause"]
    [alone] = json.loads(cli(*paths[1:], "--json")[1])["steps"][0]["alerts"]
    assert (alone["rule"], alone["severity"]) == ("vanishing", "warning")
    assert "it was large, and is of a usual size now" in alone["cause"]


def test_checkpoints_without_a_shape_in_common_are_an_error(cli: Cli, tmp_path: Path) -> None:
    for side in (4, 8):
        state = {"q.weight": torch.randn(side, side), "k.weight": torch.randn(side, side)}
        save_file(state, tmp_path / f"{side}.safetensors")
    code, _, error = cli(tmp_path / "4.safetensors", tmp_path / "8.safetensors")
    assert code == 2
    assert "can be compared with" in error
    assert "was 4x4 and is 8x8 (and 1 more); are they of one model?" in error
