"""Pictures of runs: which are drawn, of what, and the numbers behind them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.analysis.test_whatif import write_run
from transformers import LlamaConfig, LlamaForCausalLM

import tensortap
from tensortap import open_run
from tensortap.names import TensorName
from tensortap.stats import statistics
from tensortap_analysis.captured.words import family_of, kind_of, layer_of
from tensortap_analysis.plots import attention, gradients, text
from tensortap_analysis.plots.files import picture
from tensortap_analysis.plots.gallery import plot
from tensortap_analysis.plots.quick import Magnitudes
from tensortap_analysis.plots.samples import Sample, sample, sheet
from tensortap_analysis.plots.selecting import at_moments, latest
from tensortap_analysis.plots.survey import nothing_finite, survey, worst

FOLDERS = {
    "attention_maps", "comparisons", "distributions", "gradients", "heatmaps", "layers",
    "statistics",
}  # fmt: skip


def train(model, path, **how):
    ids = torch.arange(32).view(2, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tensortap.attach(model, path, **how):
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return path


pytestmark = pytest.mark.usefixtures("coarse")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of a small Llama with all values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, num_hidden_layers=2, hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return train(LlamaForCausalLM(config), tmp_path_factory.mktemp("runs") / "full", values="full")


def assert_is_a_picture(path):
    """It opens, and is more than an empty canvas."""
    with Image.open(path) as image:
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_every_kind_of_picture_is_drawn_by_one_command(cli, trained, tmp_path):
    out = tmp_path / "out"
    code, printed, error = cli("plot", trained, "--out", out, "--worst", 2, "--json")
    assert (code, error.strip()) == (0, "")
    listed = json.loads(printed)
    assert listed["failed"] == []
    files = [Path(name) for name in listed["files"]]
    assert sorted(files) == sorted(path for path in out.rglob("*") if path.is_file())
    assert {path.parent.name for path in files} == FOLDERS | {"out"}
    assert {"quick_analysis.png", "tensor_stats.txt"} == {p.name for p in files if p.parent == out}
    for path in files:
        if path.suffix == ".png":
            assert_is_a_picture(path)


@pytest.mark.parametrize("layout", ["pt", "megatron-pt"])
def test_a_folder_of_another_layout_is_drawn_like_a_run(cli, trained, tmp_path, layout):
    select, folder, out = "layers.0.attn.core/forward/*", tmp_path / "old", tmp_path / "out"
    wanted = trained, "--select", select, "--out", folder, "--layout", layout
    assert cli("export", *wanted)[0] == 0
    assert any(folder.rglob("*.pt"))
    chosen = "--select", "*/probs", "--json"
    code, printed, _ = cli("plot", folder, "--out", out, *chosen)
    assert (code, json.loads(printed)["failed"]) == (0, [])
    assert (out / "attention_maps" / "layers.0.attn.core.png").exists()
    assert len(list((out / "heatmaps").iterdir())) == 1
    assert (out / "tensor_stats.txt").read_text().splitlines()[0].split() == ["run", str(folder)]
    wrong = {"pt": "megatron-pt", "megatron-pt": "pt"}[layout]
    code, _, error = cli("plot", folder, "--out", tmp_path / "again", "--layout", wrong)
    assert (code, wrong in error) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "There is no run at"),
        (("nowhere", "--layout", "pt"), "There is no run and no folder"),
        ((".",), "is not a run"),
        (("RUN", "--select", "nothing/*"), "matches nothing"),
        (("RUN", "--step", 7), "has no step 7; it has steps 0, 1."),
        (("RUN", "--against", "nowhere"), "There is no run"),
    ],
)
def test_a_mistake_is_one_line_exit_code_2_and_no_folder(cli, trained, tmp_path, arguments, words):
    folder = tmp_path / "empty"
    folder.mkdir()
    given = [{"RUN": trained, ".": folder}.get(word, word) for word in arguments]
    code, _, error = cli("plot", *given, "--out", tmp_path / "out")
    assert code == 2
    assert words in error
    assert not (tmp_path / "out").exists()


def test_select_draws_all_it_names(tmp_path):
    names = [f"layers.1.attn.{part}/forward/output" for part in ("q", "k", "out")]
    tensors = {name: torch.randn(8, 4) for name in [*names, "layers.0.attn.q/forward/output"]}
    with open_run(write_run(tmp_path / "run", tensors)) as run:
        done = plot(run, tmp_path / "out", select="layers.1.attn.*/forward/output", step=0)
    drawn = {path.name for path in done.files if path.parent.name == "distributions"}
    assert drawn == {f"{name.replace('/', '__')}__step_0.png" for name in names}


def test_a_pattern_that_matches_nothing_beside_others_is_a_warning(cli, tmp_path):
    run = write_run(tmp_path / "run", {"layers.1/forward/output": torch.randn(4, 8)})
    select = "layers.1/*,layers.23/forward/output"
    said = "warning: the pattern 'layers.23/forward/output' matches nothing in "
    for arguments in (("plot", run, "--out", tmp_path / "out"), ("formats", run), ("show", run)):
        code, _, error = cli(*arguments, "--select", select)
        assert (code, error.strip().startswith(said)) == (0, True)


def test_a_run_of_statistics_is_drawn_as_far_as_it_goes_and_says_what_is_missing(cli, tmp_path):
    words = ("attn.core/forward/query", "attn.core/forward/key", "mlp.up/grad/weight")
    names = [f"layers.{layer}.{word}" for layer in (0, 1) for word in words]
    tensors = {name: torch.randn(2, 4, 8, 8) for name in names}
    run = write_run(tmp_path / "run", tensors, values="stats")
    code, out, _ = cli("plot", run, "--out", tmp_path / "out", "--worst", 2)
    assert code == 0
    kinds = {path.name for path in (tmp_path / "out").iterdir()}
    assert kinds == {"quick_analysis.png", "tensor_stats.txt", "statistics", "gradients"}
    assert "attention needs values of query and key" in out
    assert "only its statistics were captured" in out
    assert_is_a_picture(tmp_path / "out" / "quick_analysis.png")


def test_an_interrupted_run_is_drawn_and_said_to_be_incomplete(cli, tmp_path):
    run = write_run(tmp_path / "run", {"a/forward/output": torch.randn(4, 8)})
    state = run / "rank00000" / "rank.json"
    state.write_text(state.read_text().replace('"closed"', '"writing"'))
    code, out, error = cli("plot", run, "--out", tmp_path / "out", "--json")
    assert code == 0
    assert "warning: " in error
    assert "interrupted" in json.loads(out)["problems"][0]


def test_pictures_never_overwrite_what_is_there(cli, trained, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    code, _, error = cli("plot", trained, "--out", tmp_path)
    assert code == 2
    assert "exists" in error


def test_statistics_of_several_records_are_merged_as_of_one_tensor(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    inputs = [torch.randn(4, 8) * 10 + 1e4, torch.randn(6, 8) + 1e4]
    with tensortap.attach(model, tmp_path / "run", select="root/forward/input") as tap:
        for x in inputs:
            model(x)
        model(inputs[0]).sum().backward()
        tap.step()
    with open_run(tmp_path / "run") as run:
        found = survey(run)
        seen = [record.at for record in run.records()]
    whole = torch.cat([*inputs, inputs[0]]).double().numpy()
    assert len(seen) == 3
    assert found.names == ("root/forward/input",)
    assert found.count.sum() == whole.size
    for column, value in (
        ("mean", whole.mean()), ("std", whole.std()), ("absmax", whole.max()),
        ("l2", np.linalg.norm(whole)),
    ):  # fmt: skip
        assert getattr(found, column)[0] == pytest.approx(value, rel=1e-9)


def test_worst_are_the_first_nan_then_outliers_and_each_tensor_once(tmp_path):
    torch.manual_seed(0)
    plain, spiked, broken = torch.randn(1000), torch.randn(1000), torch.randn(1000)
    spiked[3], broken[7] = 100.0, float("nan")
    worse = broken.clone()
    worse[:500] = float("nan")
    lost = torch.full((1000,), float("nan"))
    tensors = {"a/forward/output": plain, "b/forward/output": spiked, "c/forward/input": spiked,
               "d/forward/output": broken, "e/forward/output": worse, "f/forward/output": lost,
               "g/param/weight": torch.ones(1000), "h/forward/input": torch.arange(1000),
               "i/forward/input.mask": torch.full((1000,), -math.inf)}  # fmt: skip
    with open_run(write_run(tmp_path / "run", tensors)) as run:
        found = survey(run).floating
    # Where the first NaN is says more than where most of them are.
    ranked = [name[0] for name, _ in worst(found)]
    assert ranked == ["d", "e", "b", "a", "g"]
    assert nothing_finite(found) == ["f/forward/output"]


def test_recomputed_attention_equals_the_captured_probabilities(trained):
    with open_run(trained) as run:
        held = at_moments(run, latest(survey(run)))
        module = "layers.1.attn.core"
        captured = attention.maps(run, module, held, causal=True)
        without = {name: tensor for name, tensor in held.items() if "probs" not in name}
        recomputed = attention.maps(run, module, without, causal=True)
    assert captured.source.startswith("captured")
    assert recomputed.source == "recomputed from query and key: scale 1/sqrt(8), causal mask"
    assert recomputed.probs.shape == (4, 16, 16)
    torch.testing.assert_close(recomputed.probs, captured.probs, rtol=1e-4, atol=1e-6)


def test_with_a_cache_the_last_query_sees_all_keys():
    query, key = torch.randn(2, 1, 4), torch.randn(2, 5, 4)
    found = attention.recomputed(query, key, {}, causal=True)
    assert (found.probs > 0).all()
    torch.testing.assert_close(found.probs, ((query @ key.mT) / 2).softmax(-1))


def test_gradients_that_vanish_or_explode_are_named(tmp_path):
    torch.manual_seed(0)
    sizes = {0: 1.0, 1: 1.0, 2: 1e-4, 3: 1e4, 4: 1.0, 5: 1.0, 6: 1.0}
    tensors = {f"layers.{n}.mlp.up/grad/weight": torch.randn(64) * s for n, s in sizes.items()}
    tensors["layers.6.mlp.up/grad/weight"][0] = float("inf")
    with open_run(write_run(tmp_path / "run", tensors)) as run:
        found = survey(run)
    assert gradients.judged(found, found.names) == {
        "layers.2.mlp.up/grad/weight": "vanishing",
        "layers.3.mlp.up/grad/weight": "exploding",
        "layers.6.mlp.up/grad/weight": "NaN or Inf",
    }


def test_a_sample_is_evenly_strided_over_boxes_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("tensortap_analysis.plots.samples._BOX", 70)
    numbers = torch.arange(1000.0).view(10, 10, 10)
    with open_run(write_run(tmp_path / "run", {"a/forward/output": numbers})) as run:
        [tensor] = at_moments(run, latest(survey(run))).values()
        shown = sample(tensor, 150)
        image = sheet(tensor.open(), rows=30, columns=4)
    assert shown.values.tolist() == list(range(0, 1000, 7))
    assert shown.note == "143 of 1,000 values: every 7th"
    assert image.values.shape == (25, 4)
    assert image.values[1].tolist() == [42, 45, 48, 49]
    assert "every 4th of 100 rows" in image.note


def test_the_histogram_of_everything_counts_every_value_once():
    found = Magnitudes()
    found.add(Sample(np.array([1.5, -2.5, 0.0, np.nan]), 4000, 1000))
    pieces = torch.tensor([1.5] * 30 + [0.14] * 20 + [0.0] * 10), torch.full((50,), -0.2)
    found.add_exponents([statistics(piece, exponents=True) for piece in pieces])
    assert found.positive.sum() == found.negative.sum() == 1000
    assert found.unsigned.sum() == pytest.approx(100)
    assert (found.values, found.zeros, found.strange) == (4110, 1010, 1000)


def test_shares_and_moments_of_the_text_are_those_of_the_run(trained):
    with open_run(trained) as run:
        found = survey(run)
        shares = text.shares(found, dict.fromkeys(found.names, "float32"))
        page = text.text("this run", run, found, *shares)
        # The causal mask, which is -3.4e38 above the diagonal, is no value to look at.
        records = [r for r in run.records("!*mask") if "int" not in r.dtype]
        values = [run.piece(record).double().flatten() for record in records]
    numbers = dict(line.split(maxsplit=1) for line in page.splitlines() if line[:1].strip())
    whole = torch.cat(values)
    assert numbers["run"] == "this run"
    assert float(numbers["mean"]) == pytest.approx(float(whole.mean()), rel=1e-4)
    assert float(numbers["std"]) == pytest.approx(float(whole.std(correction=0)), rel=1e-4)
    assert numbers["range"] == f"{float(whole.min()):.6g} .. {float(whole.max()):.6g}"
    for word in ("by format", "by layer type", "by phase", "float32", "attn", "backward"):
        assert word in page


@pytest.mark.parametrize(
    ("name", "layer", "family", "kind"),
    [
        ("layers.3.attn.q/forward/input", 3, "attn.q/forward/input", "attn"),
        ("layers.12/forward/output", 12, "layer/forward/output", "layer"),
        ("layers.0.input_norm/param/weight", 0, "input_norm/param/weight", "norm"),
        ("final_norm/forward/output", None, "final_norm/forward/output", "norm"),
        ("layers.1.mlp.experts.7.up/param/weight", 1, "mlp.experts.7.up/param/weight", "mlp"),
        ("embed/forward/output", None, "embed/forward/output", "embed"),
    ],
)
def test_names_tell_layer_family_and_kind(name, layer, family, kind):
    assert (layer_of(name), family_of(name)) == (layer, family)
    assert kind_of(TensorName.parse(name)) == kind


def test_file_names_stay_in_their_folder_and_differ():
    folder = Path("out")
    names = ["../../etc/passwd", "a b", "a_b", "a" * 300, "a" * 301, ".hidden"]
    paths = [picture(folder, name) for name in names]
    assert {path.parent for path in paths} == {folder}
    assert len({path.name for path in paths}) == len(names)
    assert max(len(path.name) for path in paths) < 160
    assert not any(path.name.startswith(".") for path in paths)


@pytest.mark.filterwarnings("error")
def test_odd_tensors_are_drawn_or_said_to_have_nothing_to_draw(tmp_path):
    out = "layers.{}/forward/output"
    tensors = {
        out.format(0): torch.randn(40, 4).double() * 1e300,
        out.format(1): torch.randn(40, 4) * 1e-38,
        out.format(2): torch.empty(0, 5),
        out.format(3): torch.empty(3, 0),
        out.format(4): torch.randn(4, 4, dtype=torch.complex64),
        out.format(5): torch.full((3, 4), math.nan),
        out.format(6): torch.tensor([math.inf, -math.inf, 1.0]),
        out.format(7): torch.randn(40, 4).to(torch.float8_e5m2),
        "root/forward/output.loss": torch.tensor(3.2),
        "final_norm/forward/output": torch.zeros(1),
        "a/forward/output": torch.full((30, 40), 2.5),
        "root/forward/input.input_ids": torch.arange(30).view(2, 15),
    }
    with open_run(write_run(tmp_path / "run", tensors)) as run:
        done = plot(run, tmp_path / "out", select="*")
    assert done.failed == []
    told = {line.partition(":")[0] for line in done.left_out}
    assert told == {out.format(2), out.format(3)}
    layers = {path.name.partition("__")[0] for path in done.files if path.parent.name == "layers"}
    assert layers == {f"layers.{number}" for number in (0, 1, 4, 5, 6, 7)}
    for path in done.files:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 100


def test_moments_of_huge_values_are_those_of_numpy(tmp_path):
    huge = torch.randn(64).double() * 1e300
    run_path = write_run(tmp_path / "run", {"a/forward/output": huge, "b/forward/output": huge})
    with open_run(run_path) as run:
        found = survey(run)
    scaled = huge.numpy() / 1e300
    assert found.std[0] == pytest.approx(scaled.std() * 1e300, rel=1e-9)
    assert found.l2[0] == pytest.approx(np.linalg.norm(scaled) * 1e300, rel=1e-9)


def test_a_name_with_dollar_signs_is_no_formula(tmp_path):
    run_path = write_run(tmp_path / "run", {"a$x^{$/forward/output": torch.randn(64)})
    with open_run(run_path) as run:
        done = plot(run, tmp_path / "out")
    assert done.failed == []
    assert math.isclose(len(done.files), 5)
