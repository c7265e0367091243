"""`tensortap neuron compare`: a port against its reference, by thresholds or in three ways."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.neuron.command.conftest import model_of

import tensortap

SHAPE = (1, 5, 16)


def values(seed: int, scale: float = 1.0) -> torch.Tensor:
    """Random values of a layer."""
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def old_files(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, prompt: str = "a", ids=(1, 2, 3, 4, 5)
) -> Path:
    """What the older guide wrote."""
    folder.mkdir(parents=True)
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}_output.pt")
    about = {"prompt": prompt, "input_ids": torch.tensor([list(ids)]), "statistics": {}}
    torch.save(about, folder / "metadata.pt")
    return folder


def residual(depth: int = 4) -> dict[str, torch.Tensor]:
    """Embedding, layers that add to it, final norm."""
    found = {"embedding": values(0)}
    last = found["embedding"]
    for number in range(depth):
        last = found[f"layer_{number}"] = last + values(number + 1, 0.3)
    return found | {"final_norm": last / last.std()}


def moved(
    tensors: Mapping[str, torch.Tensor], by: float, seed: int = 50
) -> dict[str, torch.Tensor]:
    """The same, off by random numbers of this size."""
    return {name: x + values(seed + n, by) for n, (name, x) in enumerate(tensors.items())}


def compare(tt, ref: Path, port: Path, *words: object):
    """Exit code and JSON."""
    code, found, error = tt(
        "neuron", "compare", "--gpu-path", ref, "--neuron-path", port, *words, "--json"
    )
    assert error == "" or "warning" in error or code == 2
    return code, found


@pytest.fixture
def ref(tmp_path: Path) -> Path:
    return old_files(tmp_path / "gpu", residual())


def test_every_measure_is_that_of_numpy(tt, ref, tmp_path):
    port = old_files(tmp_path / "port", moved(residual(), 1e-4))
    code, found = compare(tt, ref, port)
    assert code == 0
    assert found["agrees"]
    rows = found["prompts"][0]["layers"]
    assert [row["layer"] for row in rows] == [
        "embedding", "layer 0", "layer 1", "layer 2", "layer 3", "final norm",
    ]  # fmt: skip
    for row, name in zip(rows, residual(), strict=True):
        a, b = (
            torch.load(side / f"{name}_output.pt", weights_only=True).double().numpy().ravel()
            for side in (ref, port)
        )
        d = np.abs(b - a)
        relative = d / (np.abs(a) + 1e-8)
        wanted = {
            "max_abs": d.max(), "mae": d.mean(), "median": np.median(d),
            "relative_max": relative.max(), "relative_mean": relative.mean(),
            "relative_median": np.median(relative),
            "cosine": a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        }  # fmt: skip
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=1e-6), (name, key)


def test_the_older_thresholds_trip_one_by_one(tt, ref, tmp_path):
    base = residual()
    spike = base["layer_1"].clone()
    spike[0, 0, 0] += 0.02
    everywhere = base["layer_2"] + 0.005
    turned = base["layer_3"].clone() * 1e-4
    small = old_files(tmp_path / "small", base | {"layer_3": base["layer_3"] * 1e-4})
    port = old_files(
        tmp_path / "port",
        base | {"layer_1": spike, "layer_2": everywhere, "layer_3": turned.flip(-1)},
    )
    code, found = compare(tt, small, port)
    assert code == 1
    grades = {row["layer"]: row["grade"] for row in found["prompts"][0]["layers"]}
    assert grades["layer 0"] == "equal"
    assert grades["layer 1"].startswith("max abs 2x")
    assert grades["layer 2"].startswith("mean abs 5x")
    assert grades["layer 3"].startswith("cosine")
    assert found["thresholds"] == {"max_abs": 0.01, "mean_abs": 0.001, "cosine": 0.99}
    again = compare(tt, small, port, "--preset", "classic")[1]
    assert again["prompts"] == found["prompts"], "classic is the guide's own name for it"


def test_in_three_ways_the_noise_decides(tt, ref, tmp_path):
    noise = old_files(tmp_path / "noise", moved(residual(), 0.05, seed=70))
    port = old_files(tmp_path / "port", moved(residual(), 0.05, seed=90))
    assert compare(tt, ref, port)[0] == 1, "too far for the fixed thresholds"
    code, found = compare(tt, ref, port, "--noise", noise)
    assert (code, found["preset"]) == (0, "noise")
    assert found["thresholds"] == {"ratio": 1.5, "bhattacharyya": 0.99}
    broken = moved(residual(), 0.05, seed=90)
    for number in (2, 3):
        broken[f"layer_{number}"] = broken[f"layer_{number}"] + values(200, 0.5)
    code, found = compare(tt, ref, old_files(tmp_path / "bad", broken), "--noise", noise)
    assert code == 1
    told = found["prompts"][0]
    assert told["first_divergence"] == "layers.2/forward/output"
    assert told["first_local_divergence"] == "layers.2/forward/output"
    row = next(row for row in told["layers"] if row["layer"] == "layer 2")
    d, n = (
        torch.load(folder / "layer_2_output.pt", weights_only=True).double() - residual()["layer_2"]
        for folder in (tmp_path / "bad", noise)
    )
    assert row["noise_ratio"] == pytest.approx(float(d.norm() / n.norm()), rel=1e-6)
    assert 0 < row["bhattacharyya"] < 1


def test_a_jump_is_told_with_the_mean_changes_into_and_out_of_the_layer(tt, tmp_path):
    base = residual()
    jumping = dict(base)
    jumping["layer_1"] = base["layer_1"].clone()
    jumping["layer_1"][0, 2, 3] += 50
    ref, port = old_files(tmp_path / "gpu", base), old_files(tmp_path / "port", jumping)
    code, found = compare(tt, ref, port)
    assert code == 1
    jumps = found["prompts"][0]["jumps"]
    assert [(one["run"], one["from"], one["to"]) for one in jumps] == [
        ("port", "layers.0/forward/output", "layers.1/forward/output"),
        ("port", "layers.1/forward/output", "layers.2/forward/output"),
    ]
    layers = [jumping[f"layer_{number}"].double() for number in range(4)]
    changes = [(after - before).abs() for before, after in pairwise(layers)]
    assert jumps[0]["max_change"] == pytest.approx(float(changes[0].max()))
    assert jumps[0]["mean_change_into"] == pytest.approx(float(changes[0].mean()))
    assert jumps[0]["mean_change_out_of"] == pytest.approx(float(changes[1].mean()))
    printed = tt("neuron", "compare", "--gpu-path", ref, "--neuron-path", port)[1]
    assert "jump between layers: port: layer 0 -> layer 1: max |change|" in printed


def test_nan_in_both_runs_is_no_agreement_and_large_means_are_told(tt, tmp_path):
    base = residual()
    base["layer_1"][0, 0, 0] = float("nan")
    base["layer_2"] = base["layer_2"] + 20
    ref, port = (old_files(tmp_path / name, base) for name in ("gpu", "port"))
    code, found = compare(tt, ref, port)
    assert code == 1
    told = found["prompts"][0]
    assert told["verdict"] == "agree", "they are equal"
    assert told["abnormal"][0] == "layer 1: port 1 NaN; reference 1 NaN"
    assert told["abnormal"][1].startswith("layer 2: port mean 20")
    assert [jump["to"] for jump in told["jumps"]] == [
        f"layers.{number}/forward/output" for number in (3, 3)
    ], "NaN is told of the layer that has it"
    printed = tt("neuron", "compare", "--gpu-path", ref, "--neuron-path", port)[1]
    assert "the port has NaN or infinities, as the reference has" in printed


def test_nan_in_the_port_alone_is_the_first_local_divergence(tt, ref, tmp_path):
    base = residual()
    base["layer_2"][0, 1, 1] = float("inf")
    code, found = compare(tt, ref, old_files(tmp_path / "port", base))
    assert code == 1
    assert found["prompts"][0]["first_local_divergence"] == "layers.2/forward/output"
    assert found["prompts"][0]["abnormal"] == ["layer 2: port 1 Inf"]


def folder_of_prompts(out: Path, *ids: tuple[int, ...], off: float = 0.0) -> Path:
    """As `neuron layers --out` makes it, in the files of older scripts."""
    for number, one in enumerate(ids):
        tensors = {name: x * one[0] for name, x in residual().items()}
        moved_by = moved(tensors, off) if off else tensors
        old_files(out / f"prompt-{number}", moved_by, prompt=str(one), ids=one)
    return out


def test_prompts_are_matched_by_their_tokens_not_by_their_order(tt, tmp_path):
    one, two = (1, 2, 3, 4, 5), (2, 4, 6, 8, 10)
    ref = folder_of_prompts(tmp_path / "gpu", one, two)
    port = folder_of_prompts(tmp_path / "port", two, one)
    code, found = compare(tt, ref, port)
    assert code == 0
    assert [told["prompt"] for told in found["prompts"]] == [str(two), str(one)]
    assert all(row["max_abs"] == 0 for told in found["prompts"] for row in told["layers"])


def test_a_prompt_without_a_partner_leaves_the_question_open(tt, tmp_path):
    one, two = (1, 2, 3, 4, 5), (2, 4, 6, 8, 10)
    ref = folder_of_prompts(tmp_path / "gpu", one)
    port = folder_of_prompts(tmp_path / "port", one, two)
    code, found = compare(tt, ref, port)
    assert code == 2
    assert len(found["prompts"]) == 1
    assert "prompt-1: no run of --gpu-path was given the same tokens" in found["alone"][0]
    code, _, error = tt("neuron", "compare", "--gpu-path", ref, "--neuron-path", port / "prompt-1")
    assert code == 2
    assert "given other tokens" in error
    printed = tt("neuron", "compare", "--gpu-path", ref, "--neuron-path", port)[1]
    assert "1 of 1 prompts agree; 1 could not be compared" in printed


def test_a_port_whose_noise_run_had_other_tokens_is_not_judged_without(tt, tmp_path):
    one, two = (1, 2, 3, 4, 5), (2, 4, 6, 8, 10)
    ref, port = (folder_of_prompts(tmp_path / side, one, two) for side in ("gpu", "port"))
    noise = folder_of_prompts(tmp_path / "noise", one, off=0.01)
    code, found = compare(tt, ref, port, "--noise", noise)
    assert (code, len(found["prompts"])) == (2, 1)
    assert "prompt-1: no run of --noise was given the same tokens" in found["alone"][0]


def test_padding_does_not_make_the_tokens_others(tt, tmp_path):
    tensors = residual()
    ref = old_files(tmp_path / "gpu", tensors)
    wide = {name: torch.cat([x, torch.full((1, 3, 16), 9.0)], 1) for name, x in tensors.items()}
    port = old_files(tmp_path / "port", wide, ids=(1, 2, 3, 4, 5, 0, 0, 0))
    about = torch.load(port / "metadata.pt", weights_only=True)
    about["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    torch.save(about, port / "metadata.pt")
    code, found = compare(tt, ref, port)
    assert (code, len(found["prompts"][0]["layers"])) == (0, 6)
    assert found["prompts"][0]["warnings"] == []


def test_padding_of_shorter_rows_is_compared_and_said(tt, tmp_path):
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for side in ("gpu", "port"):
        layer = torch.cat([values(1), values(2)])
        if side == "port":
            layer[1, 2:] = 77
        old_files(tmp_path / side, {"layer_0": layer})
        torch.save({"attention_mask": mask}, tmp_path / side / "metadata.pt")
    code, found = compare(tt, tmp_path / "gpu", tmp_path / "port")
    assert code == 1
    assert "padding is cut behind the longest row" in str(found["prompts"][0]["warnings"])
    for side in ("gpu", "port"):
        about = {"token_ids": [[1, 2], [1, 0]], "attention_mask": [[1, 1], [1, 0]]}
        model, run = model_of("llama"), tmp_path / f"{side}-run"
        select = "layers.0/forward/output"
        with tensortap.attach(model, run, select=select, values="full", metadata=about):
            model(torch.tensor([[1, 2], [1, 0]]))
    found = compare(tt, tmp_path / "gpu-run", tmp_path / "port-run")[1]
    assert "leaves tokens out, and their padding is compared" in str(
        found["prompts"][0]["warnings"]
    )


def test_noise_of_another_dtype_than_the_ports_is_warned_of(tt, ref, tmp_path):
    port = old_files(tmp_path / "port", moved(residual(), 0.01))
    half = {name: x.bfloat16() for name, x in residual().items()}
    noise = old_files(tmp_path / "noise", half)
    found = compare(tt, ref, port, "--noise", noise)[1]
    assert "--noise is bfloat16 and the port float32" in found["prompts"][0]["warnings"][0]
    noise = old_files(tmp_path / "same", moved(residual(), 0.01))
    found = compare(tt, ref, port, "--noise", noise)[1]
    assert "--noise is" not in str(found["prompts"][0]["warnings"])
    coarse = old_files(tmp_path / "coarse", half)
    found = compare(tt, coarse, port)[1]
    assert "the reference is bfloat16 and the port float32" in found["prompts"][0]["warnings"][0]
    assert "the reference is" not in str(compare(tt, ref, coarse)[1]["prompts"][0]["warnings"])


def test_a_layer_that_the_port_lacks_is_told(tt, ref, tmp_path):
    base = residual()
    del base["layer_3"]
    port = old_files(tmp_path / "port", base)
    code, found = compare(tt, ref, port)
    assert code == 2, "all that could be compared agrees, and nobody can say more"
    assert found["prompts"][0]["missing"] == ["layer 3: only the reference has it"]
    code, printed, error = tt("neuron", "compare", "--gpu-path", ref, "--neuron-path", port)
    assert "1 could not be compared" in printed
    assert "nobody can say" in printed
    assert "not compared: layer 3: only the reference has it" in error
    assert compare(tt, ref, port, "--layer-pattern", "layer_[0-2]")[0] == 0
    found = compare(tt, port, ref)[1]
    assert found["prompts"][0]["missing"] == ["layer 3: only the port has it"]


def test_warnings_name_the_users_folders_and_the_port(tt, ref, tmp_path):
    port = old_files(tmp_path / "port", residual())
    (port / "metadata.pt").unlink()
    [said] = compare(tt, ref, port)[1]["prompts"][0]["warnings"]
    assert said.startswith(f"the port is incomplete: {port}: 1 gap")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("layer_*", 4), ("layer_1", 1), ("layer_[01]_output", 2), ("layer_2_output.pt", 1),
        ("*_output", 6), ("layers.3", 1), ("embedding", 1), ("final_norm", 1),
    ],
)  # fmt: skip
def test_a_pattern_chooses_layers_as_files_or_names(tt, ref, tmp_path, pattern, count):
    port = old_files(tmp_path / "port", residual())
    code, found = compare(tt, ref, port, "--layer-pattern", pattern)
    assert (code, len(found["prompts"][0]["layers"])) == (0, count)


def test_the_report_is_json_and_a_page_for_each_prompt(tt, tmp_path):
    ids = (1, 2, 3, 4, 5), (2, 4, 6, 8, 10)
    ref = folder_of_prompts(tmp_path / "gpu", *ids)
    port = folder_of_prompts(tmp_path / "port", *ids, off=0.5)
    code, found = compare(tt, ref, port, "--report-path", tmp_path / "report.json")
    assert code == 1
    pages = [tmp_path / f"report-prompt-{number}.html" for number in (0, 1)]
    assert found["pages"] == list(map(str, pages))
    assert json.loads((tmp_path / "report.json").read_text()) == found
    for page in pages:
        assert "layers.3/forward/output" in page.read_text()
    single = ("--gpu-path", ref / "prompt-0", "--neuron-path", port / "prompt-0")
    code, printed, _ = tt("neuron", "compare", *single, "--report-path", tmp_path)
    assert code == 1
    assert f"report: {tmp_path / 'report.html'}" in printed
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--preset", "strict"), "--preset strict: write one of port, classic, noise"),
        (("--preset", "noise"), "--preset noise judges by a noise run; give --noise PATH"),
        (("--layer-pattern", "block_*"), "'block_*' matches no layer"),
        (("--report-path", "/nowhere/at/all.json"), "there is no folder /nowhere/at"),
        (("--report-path", "/proc/report.json"), "--report-path /proc/report.json: "),
        (("--neuron-path", "/nowhere"), "--neuron-path /nowhere: neither a run"),
        (("--noise", "/nowhere"), "--noise /nowhere: neither a run"),
    ],
)
def test_a_mistake_is_one_line(tt, ref, tmp_path, words, said):
    port = old_files(tmp_path / "port", residual())
    given = ("--gpu-path", ref, "--neuron-path", port, *words)
    code, printed, error = tt("neuron", "compare", *given)
    assert code == 2
    assert said in error
    assert "Traceback" not in printed + error


def test_without_tensortap_analysis_the_error_says_what_to_install(tt, ref, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensortap_analysis", None)
    code, _, error = tt("neuron", "compare", "--gpu-path", ref, "--neuron-path", ref)
    assert code == 2
    assert 'pip install "tensortap[analysis]"' in error


def test_forwards_of_generated_tokens_are_told_apart(tt, tmp_path):
    model, ids = model_of("llama"), torch.tensor([[5, 6, 7]])
    for side in ("gpu", "port"):
        select = "re:layers\\.0/forward/output"
        with tensortap.attach(model, tmp_path / side, select=select, values="full"):
            model.generate(ids, max_new_tokens=2, do_sample=False)
    code, found = compare(tt, tmp_path / "gpu", tmp_path / "port")
    assert code == 0
    rows = found["prompts"][0]["layers"]
    assert [(row["layer"], row["microbatch"]) for row in rows] == [("layer 0", 0), ("layer 0", 1)]
    given = ("--gpu-path", tmp_path / "gpu", "--neuron-path", tmp_path / "port")
    assert "layer 0 (step 0 microbatch 1)" in tt("neuron", "compare", *given)[1]


def test_statistics_alone_prove_a_difference_and_never_that_a_port_is_right(tt, tmp_path):
    model, ids = model_of("llama"), torch.tensor([[5, 6, 7]])
    names = "embed/forward/output,layers.0/forward/output"
    for side, off in (("gpu", 0.0), ("port", 1e-5), ("broken", 5.0)):
        with torch.no_grad():
            model.model.embed_tokens.weight.add_(off)
            with tensortap.attach(model, tmp_path / side, select=names, values="stats"):
                model(ids)
    code, found = compare(tt, tmp_path / "gpu", tmp_path / "port")
    assert (code, found["prompts"][0]["verdict"]) == (2, "incomparable")
    code, found = compare(tt, tmp_path / "gpu", tmp_path / "broken")
    assert (code, found["prompts"][0]["verdict"]) == (1, "differ")
