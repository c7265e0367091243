"""What-if of number formats: exact against numpy, estimates against exact, and the command."""

from __future__ import annotations

import csv
import json
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.analysis.small_runs import capture, llama
from tests.core.store.building import record
from tests.core.store.building import write_run as write_rows

import tensortap
from tensortap import RunDirectorySink
from tensortap.errors import ConfigError
from tensortap.names import TensorName
from tensortap.records import Coordinates, Placement, RunInfo, TensorRecord
from tensortap.stats import statistics
from tensortap_analysis.measuring.boxes import boxes
from tensortap_analysis.whatif import expected, judging, what_if
from tensortap_analysis.whatif.estimate import estimate
from tensortap_analysis.whatif.judging import FORMATS
from tensortap_analysis.whatif.rounding import Values, codec_of, tally

NAME = "layers.0.mlp.down/forward/output"


def write_run(path, tensors, *, values="full", dims=None):
    """A run of one rank and one step; `tensors` by name."""
    sink = RunDirectorySink(path)
    sink.open(RunInfo(launch_id="test", created="2026-01-01T00:00:00+00:00"))
    for seq, (name, tensor) in enumerate(tensors.items()):
        record = TensorRecord(
            name=TensorName.parse(name), native=name, at=Coordinates(), shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."), device="cpu", seq=seq, values=values,
            dims=(dims or {}).get(name), stats=statistics(tensor, exponents=values == "stats"),
        )  # fmt: skip
        sink.write(record, tensor if values == "full" else None)
    sink.end_step(0)
    sink.close()
    return path


def sqnr(x, rounded):
    x = x.astype(np.float64)
    return 10 * np.log10((x**2).sum() / ((x - rounded) ** 2).sum())


def int8(x):
    scale = np.float32(np.abs(x).max()) / np.float32(127)
    return np.round(x / scale).astype(np.float64) * scale


def mxfp8(x):
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
    scale = 2.0 ** (np.floor(np.log2(np.abs(blocks).max(-1, keepdims=True))) - 8)
    clipped = np.clip(blocks / scale, -448, 448)
    return (clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale).reshape(x.shape)


def test_sqnr_and_underflow_are_those_of_numpy(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(96, 128) * torch.logspace(-3, 1, 96)[:, None]
    run = write_run(tmp_path / "run", {NAME: x})
    rows = {row.format: row for row in expected(run, formats=("int8", "mxfp8", "fp16"))}
    for name, rounded in (
        ("int8", int8(x.numpy())),
        ("mxfp8", mxfp8(x.numpy())),
        ("fp16", x.numpy().astype(np.float16)),
    ):
        assert rows[name].sqnr_db == pytest.approx(sqnr(x.numpy(), rounded), abs=1e-6)
        assert rows[name].underflow == np.mean(rounded == 0)
        assert rows[name].nonzero == x.numel()
        assert rows[name].basis == "values"


def test_overflow_counts_what_saturates_by_more_than_rounding(tmp_path):
    # The block's scale is 2^-8 * 256 = 1: 464 is half a spacing beyond 448, 470 is farther.
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([470.0, 464.0, 450.0, 1.0])
    [row] = expected(write_run(tmp_path / "mx", {NAME: x}), formats=("mxfp8",))
    assert row.overflow == 1 / 4
    y = torch.tensor([[60000.0, 70000.0, -1e6, 1e-9]])
    [row] = expected(write_run(tmp_path / "fp16", {NAME: y}), formats=("fp16",))
    assert (row.overflow, row.underflow) == (2 / 4, 1 / 4)
    [row] = expected(write_run(tmp_path / "hifp8", {NAME: y}), formats=("hifp8",))
    assert row.overflow == 3 / 4


def test_int8_never_overflows_and_is_harmed_by_one_outlier(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    spoiled = x.clone()
    spoiled[3, 5] = 1000.0
    other = "layers.1.mlp.down/forward/output"
    before, after = expected(
        write_run(tmp_path / "run", {NAME: x, other: spoiled}), formats=("int8",)
    )
    assert before.overflow == after.overflow == 0.0
    assert before.underflow < 0.02 < 0.9 < after.underflow


def test_all_zeros_have_no_sqnr_and_exact_values_an_infinite_one(tmp_path):
    run = write_run(tmp_path / "run", {NAME: torch.zeros(4, 32), "a/forward/output": torch.ones(4)})
    rows = {(row.name, row.format): row for row in expected(run, formats=("mxfp4", "bf16"))}
    assert rows[NAME, "mxfp4"].sqnr_db is None
    assert rows["a/forward/output", "bf16"].sqnr_db == math.inf


def test_a_nan_makes_formats_with_a_common_scale_lose_everything_and_others_their_block(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    x[0, 0] = float("nan")
    run = write_run(tmp_path / "run", {NAME: x})
    rows = {row.format: row for row in expected(run, formats=("int8", "nvfp4", "mxfp8", "hifp8"))}
    assert rows["int8"].sqnr_db == rows["nvfp4"].sqnr_db == rows["mxfp8"].sqnr_db == -math.inf
    clean = x.flatten()[1:].numpy()
    rounded = codec_of("hifp8").fake_quantize(x.flatten()[1:]).numpy()
    assert rows["hifp8"].sqnr_db == pytest.approx(sqnr(clean, rounded))
    assert rows["hifp8"].nonzero == 255


def test_tensors_larger_than_a_box_are_rounded_with_the_scale_of_the_whole(tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(64, 96) * torch.logspace(-2, 2, 64)[:, None]
    run = write_run(tmp_path / "run", {NAME: x})
    formats = ("hifp8", "mxfp8", "mxfp4", "nvfp4", "int8")
    whole = expected(run, formats=formats)
    monkeypatch.setattr("tensortap_analysis.whatif.judging._BOX", 1000)
    for row, boxed in zip(whole, expected(run, formats=formats), strict=True):
        assert boxed.sqnr_db == pytest.approx(row.sqnr_db, rel=1e-12)
        assert (boxed.underflow, boxed.overflow) == (row.underflow, row.overflow)


@pytest.mark.parametrize(
    ("name", "dims", "axis"),
    [
        ("layers.0.mlp.up/param/weight", "out in", -1),
        ("layers.0.mlp.up/param/weight", "in out", 0),
        ("layers.0.attn.core/forward/value", "seq dim", 0),
        ("layers.0.attn.core/forward/key", "seq dim", -1),
        (NAME, None, -1),
    ],
)
def test_blocks_lie_along_the_contraction_axis(tmp_path, name, dims, axis):
    torch.manual_seed(0)
    x = torch.randn(64, 32) * torch.logspace(-2, 2, 64)[:, None]
    [row] = expected(write_run(tmp_path / "run", {name: x}, dims={name: dims}), formats=("mxfp8",))
    rows = x.numpy() if axis == -1 else x.numpy().T
    assert row.sqnr_db == pytest.approx(sqnr(rows, mxfp8(rows)), abs=1e-6)


DISTRIBUTIONS = {
    "normal": lambda: torch.randn(256, 512),
    "uniform": lambda: torch.rand(256, 512) * 2 - 1,
    "heavy tails": lambda: torch.distributions.StudentT(3.0).sample((256, 512)),
    "tiny": lambda: torch.randn(256, 512) * 3e-6,
    "relu": lambda: torch.randn(256, 512).relu(),
    "bfloat16": lambda: torch.randn(256, 512).bfloat16(),
    "outlier channels": lambda: torch.randn(256, 512) * torch.where(torch.arange(512) < 4, 60, 1),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["hifp8", "int8", "fp16", "bf16"])
def test_estimates_of_formats_with_one_scale_are_within_half_a_decibel(kind, name):
    torch.manual_seed(0)
    x = DISTRIBUTIONS[kind]()
    exact = tally(codec_of(name), Values(x.float()))
    guess = estimate(codec_of(name), statistics(x, exponents=True), x.dtype)
    if exact.sqnr_db == math.inf or exact.sqnr_db > 150:
        assert guess.sqnr_db > 150
    else:
        assert guess.sqnr_db == pytest.approx(exact.sqnr_db, abs=0.5)
    assert guess.nonzero == exact.nonzero
    assert guess.underflow == pytest.approx(exact.underflow, abs=0.01 * exact.nonzero)
    assert guess.overflow == pytest.approx(exact.overflow, abs=0.01 * exact.nonzero)


@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy tails", "tiny", "relu", "bfloat16"])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp8_e5m2", "mxfp4", "nvfp4", "int4"])
def test_estimates_of_formats_with_blocks_are_near_where_values_are_independent(kind, name):
    torch.manual_seed(0)
    x = DISTRIBUTIONS[kind]()
    exact = tally(codec_of(name), Values(x.float()))
    guess = estimate(codec_of(name), statistics(x, exponents=True), x.dtype)
    assert guess.sqnr_db == pytest.approx(exact.sqnr_db, abs=0.5)
    assert guess.underflow == pytest.approx(exact.underflow, abs=0.02 * exact.nonzero)


def test_estimates_of_formats_with_blocks_are_low_where_large_values_share_blocks():
    torch.manual_seed(0)
    x = torch.randn(256, 512) * torch.logspace(-2, 2, 256)[:, None]
    guess = estimate(codec_of("mxfp4"), statistics(x, exponents=True), x.dtype)
    exact = tally(codec_of("mxfp4"), Values(x))
    assert guess.sqnr_db < exact.sqnr_db
    assert guess.underflow > 3 * exact.underflow


def test_a_run_of_statistics_gives_estimates_that_say_so(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(128, 256)
    rows = expected(
        write_run(tmp_path / "s", {NAME: x}, values="stats"), formats=("hifp8", "mxfp4")
    )
    exact = expected(write_run(tmp_path / "v", {NAME: x}), formats=("hifp8", "mxfp4"))
    assert [row.basis for row in rows] == ["exponents"] * 2
    for guess, known in zip(rows, exact, strict=True):
        assert guess.sqnr_db == pytest.approx(known.sqnr_db, abs=0.5)


def test_a_capture_of_a_model_is_judged_over_all_its_steps(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
    inputs = [torch.randn(4, 32) for _ in range(3)]
    with tensortap.attach(model, tmp_path / "run", values="full", select="0/forward/input") as tap:
        for x in inputs:
            model(x).sum().backward()
            tap.step()
    [row] = expected(tmp_path / "run", formats=("int8",))
    x, rounded = (
        np.concatenate(parts)
        for parts in zip(*((x.numpy(), int8(x.numpy())) for x in inputs), strict=True)
    )
    assert row.moments == 3
    assert row.sqnr_db == pytest.approx(sqnr(x, rounded), abs=1e-6)


def test_integers_and_bare_statistics_are_left_out_with_a_reason(tmp_path):
    run = write_run(tmp_path / "run", {NAME: torch.arange(8)})
    found = what_if(run)
    assert found.rows == ()
    assert found.skipped == (f"{NAME}: int64 is not rounded to a format",)


def test_terms_of_a_sum_are_not_estimated(tmp_path):
    x = torch.randn(4, 32)
    sink = RunDirectorySink(tmp_path / "run")
    sink.open(RunInfo(launch_id="test", created="2026-01-01T00:00:00+00:00"))
    record = TensorRecord(
        name=TensorName.parse(NAME), native=NAME, at=Coordinates(), shape=(4, 32), dtype="float32",
        device="cpu", seq=0, stats=statistics(x, exponents=True),
        placement=Placement((4, 32), partial=("tp",)),
    )  # fmt: skip
    sink.write(record, None)
    sink.close()
    assert "summands do not tell those of the sum" in what_if(tmp_path / "run").skipped[0]


def test_boxes_cover_the_shape_once_in_order_and_keep_an_axis_whole():
    shape = (3, 7, 10)
    seen = torch.zeros(shape, dtype=torch.int64)
    order = []
    numbers = torch.arange(210).view(shape)
    for box in boxes(shape, 25, keep=2):
        part = tuple(slice(*edges) for edges in box)
        seen[part] += 1
        order += numbers[part].flatten().tolist()
        assert box[2] == (0, 10)
        assert numbers[part].numel() <= 25
    assert (seen == 1).all()
    assert order == list(range(210))


@pytest.fixture
def two(tmp_path):
    torch.manual_seed(0)
    hard = torch.randn(64, 64)
    hard[0, 0] = 100.0
    easy = "layers.1.mlp.down/forward/output"
    return write_run(tmp_path / "run", {easy: torch.randn(64, 64), NAME: hard})


def test_the_command_prints_the_worst_tensor_first_and_what_it_needs(cli, two):
    code, out, _ = cli("formats", two, "--formats", "int8,mxfp8", "--threshold-db", 30)
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(" layers")]
    assert [row[0] for row in rows] == [NAME, "layers.1.mlp.down/forward/output"]
    assert rows[1][-1] == "int8"


def test_the_command_writes_all_rows_as_json_csv_and_markdown(cli, two, tmp_path):
    _, out, _ = cli("formats", two, "--json", "--out", tmp_path / "rows.csv")
    document = json.loads(out)
    assert len(document["rows"]) == 10
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sqnr_db"]) for row in rows] == [row["sqnr_db"] for row in document["rows"]]
    assert cli("formats", two, "--out", tmp_path / "rows.md")[0] == 0
    assert len((tmp_path / "rows.md").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--formats", "int9"), "format 'int9' is not known"),
        (("--select", "nothing/*"), "matches nothing"),
        (("--formats", " ,"), "names no format"),
        (("--out", "rows.xls"), "must end in .csv, .md, .json"),
        (("--out", "nowhere/rows.csv"), "there is no directory nowhere"),
        (("--out", "/proc/rows.csv"), "cannot be written"),
        (("--threshold-db", "nan"), "a number of decibels"),
        (("--step", 4), "has no step 4; it has step 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cli, two, arguments, words):
    code, _, error = cli("formats", two, *arguments)
    assert code == 2
    assert words in error


def test_one_tensor_under_several_names_is_one_row_and_all_rows_are_in_the_file(cli, tmp_path):
    x = torch.randn(64, 64)
    names = ("layers.0/forward/output", "layers.1/forward/input", "layers.1.norm/forward/input")
    run = write_run(tmp_path / "run", {name: x.clone() for name in names} | {NAME: x * 1.01})
    code, out, _ = cli("formats", run, "--formats", "int8,int8", "--out", tmp_path / "rows.json")
    assert code == 0
    shown = [line for line in out.splitlines() if line.startswith(" layers")]
    assert len(shown) == 2
    assert any("layers.0/forward/output and 2 more names" in line for line in shown)
    assert out.splitlines()[0].split() == ["int8", "needs", "for"]
    assert "8 bit" in out.splitlines()[1]
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_number_there_is_is_rounded_like_any_other(name):
    lowest = torch.finfo(torch.float32).min
    x = torch.randn(4, 64)
    x[0, ::5] = lowest
    found = tally(codec_of(name), Values(x))
    small = tally(codec_of(name), Values((x.double() * 2.0**-100).float()))
    assert not math.isnan(found.sqnr_db)
    if name != "hifp8":  # which has no scale; beyond 140 dB the rounding of float32 decides
        assert min(found.sqnr_db, 140) == pytest.approx(min(small.sqnr_db, 140), abs=0.01)


def test_values_whose_squares_no_float_holds_are_said_and_the_others_judged(tmp_path):
    huge = torch.randn(4, 32).double() * 1e300
    found = what_if(write_run(tmp_path / "run", {"a/forward/output": huge, NAME: huge * 1e-300}))
    assert {row.name for row in found.rows} == {NAME}
    assert found.skipped == ("a/forward/output: its squares are beyond what float64 holds",)


def test_every_format_is_judged_on_every_tensor_of_a_captured_model(cli, tmp_path):
    run = capture(llama(), tmp_path / "run")
    code, out, error = cli("formats", run, "--json")
    found = json.loads(out)
    assert (code, error.strip()) == (0, "")
    names = {row["name"] for row in found["rows"]}
    assert "layers.3.attn.core/backward/grad_query" in names
    assert len(found["rows"]) == 5 * len(names)
    skipped = [line.partition(": ")[2] for line in found["skipped"]]
    assert set(skipped) == {
        "int64 is not rounded to a format", "a mask is not rounded to a format"
    }  # fmt: skip


def test_a_sample_is_judged_with_the_largest_value_of_all(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    x[1, 1] = 100.0  # not in the sample
    sampled = record(NAME, None, 0, values="sample", stride=4, shape=(64, 64), dtype="float32",
                     stats=statistics(x))  # fmt: skip
    run = write_rows(tmp_path / "run", [(sampled, x.flatten()[::4].clone())])
    [guess] = expected(run, formats=("int8",))
    [exact] = expected(write_run(tmp_path / "full", {NAME: x}), formats=("int8",))
    assert guess.basis == "exponents"
    assert guess.sqnr_db == pytest.approx(exact.sqnr_db, abs=0.5)
    assert guess.nonzero == pytest.approx(exact.nonzero, rel=0.01)


def test_statistics_with_padding_are_not_estimated(tmp_path):
    x = torch.randn(8, 32)
    padded = record(NAME, None, 0, shape=(8, 32), stats=statistics(x, exponents=True),
                    placement=Placement((8, 32), valid={0: 5}))  # fmt: skip
    found = what_if(write_rows(tmp_path / "run", [(padded, None)]))
    assert found.rows == ()
    assert "padding" in found.skipped[0]


def test_equal_payloads_are_rounded_once(tmp_path, monkeypatch):
    x = torch.randn(64, 64)
    names = ("layers.0/forward/output", "layers.1/forward/input")
    run = write_run(tmp_path / "run", {name: x.clone() for name in names} | {NAME: -x})
    rounded = []
    known = judging.tally
    monkeypatch.setattr(judging, "tally", lambda *given: rounded.append(1) or known(*given))
    rows = expected(run, formats=("mxfp8",))
    assert len(rounded) == 2
    assert rows[0].sqnr_db == rows[1].sqnr_db


def test_masks_are_no_values_to_round(cli, tmp_path):
    lowest = torch.finfo(torch.float32).min
    tensors = {
        "layers.0/forward/input.attention_mask": torch.zeros(4, 4),
        "layers.0.attn/forward/input.1": torch.tensor([[0.0, lowest], [0.0, 0.0]]),
        NAME: torch.randn(4, 32),
    }
    code, out, _ = cli("formats", write_run(tmp_path / "run", tensors), "--json")
    found = json.loads(out)
    assert code == 0
    assert {row["name"] for row in found["rows"]} == {NAME}
    assert len(found["skipped"]) == 2


def test_an_interrupted_run_is_judged_and_said_to_be_incomplete(cli, tmp_path):
    run = write_run(tmp_path / "run", {NAME: torch.randn(4, 32)})
    state = run / "rank00000" / "rank.json"
    state.write_text(state.read_text().replace('"closed"', '"writing"'))
    code, _, error = cli("formats", run, "--formats", "int8")
    assert code == 0
    assert "warning: " in error
    assert "rank00000" in error


def test_a_folder_of_another_layout_is_judged_like_a_run(cli, two, tmp_path):
    assert cli("export", two, "--out", tmp_path / "pt")[0] == 0
    code, out, _ = cli("formats", tmp_path / "pt", "--json")
    assert code == 0
    known = json.loads(cli("formats", two, "--json")[1])
    assert json.loads(out)["rows"] == known["rows"]


def test_an_unknown_format_is_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match="int9"):
        expected("no such run", formats=("int9",))
