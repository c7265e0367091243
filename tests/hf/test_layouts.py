"""The layouts `layer-npy` and `first-layer-npz`: to and from the files of older scripts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tensortap
from tensortap.errors import RunError, RunExists
from tensortap.layouts import Layout, layout
from tensortap.sinks import MemorySink
from tensortap.store import RunDirectorySink
from tensortap_hf import modes

LAYOUTS = ("layer-npy", "first-layer-npz")
MIXER = "layers.0.mixer/forward/output"


def ignore(done: int) -> None:
    """Progress that nobody watches."""


def capture(model: Any, path: Path, mode: str, lengths: tuple[int, ...] = (6, 6)) -> Path:
    """A run of a mode: layers and mixers, a step for each length."""
    generator = torch.Generator().manual_seed(4)
    with (
        modes.apply(model.eval(), mode, family="generic"),
        tensortap.attach(
            model, path, select="layers.*", phases=("forward",), values="full",
            metadata={"model": "a small one"},
        ),
        torch.no_grad(),
    ):  # fmt: skip
        for length in lengths:
            model(input_ids=torch.randint(3, 64, (1, length), generator=generator))
    return path


@pytest.fixture
def mamba(build: Any) -> Any:
    return build("mamba")


def export(name: str, run: Path, out: Path, select: str = "*") -> Any:
    with tensortap.open_run(run) as opened:
        return layout(name).export(opened, out, select, ignore)


def load(name: str, folder: Path, out: Path) -> Any:
    return layout(name).load(folder, RunDirectorySink(out), ignore)


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_a_layout(name: str) -> None:
    found: Layout = layout(name)
    assert found.name == name


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_layer_npy_holds_the_output_of_each_mixer(mamba: Any, tmp_path: Path, mode: str) -> None:
    run = capture(mamba, tmp_path / mode, mode)
    moved = export("layer-npy", run, tmp_path / "out")
    assert (moved.records, moved.files, moved.skipped) == (4, 3, ())
    stats = json.loads((tmp_path / "out" / f"mode_{mode}_stats.json").read_text())
    assert (stats["mode"], stats["basis"], stats["model"]) == (mode, "native", "a small one")
    assert "output of its mixer, before the residual" in stats["note"]
    with tensortap.open_run(run) as opened:
        for layer in (0, 1):
            found = np.load(tmp_path / "out" / f"mode_{mode}_layer_{layer}.npy", allow_pickle=False)
            name = f"layers.{layer}.mixer/forward/output"
            wanted = torch.cat([opened.tensor(name, step=step) for step in (0, 1)]).float().numpy()
            assert found.dtype == (np.float16 if mode == "fp16" else np.float32)
            np.testing.assert_array_equal(found.astype(np.float32), wanted)
            said = stats["layers"][str(layer)]
            assert said["tensor"] == name
            assert said["mean"] == pytest.approx(wanted.astype(np.float64).mean())
            assert said["first_10"] == wanted.ravel()[:10].tolist()


def test_samples_of_unequal_length_become_a_file_each(mamba: Any, tmp_path: Path) -> None:
    run = capture(mamba, tmp_path / "run", "fp32", (5, 8, 2))
    export("layer-npy", run, tmp_path / "npy")
    export("first-layer-npz", run, tmp_path / "npz")
    for sample, length in enumerate((5, 8, 2)):
        found = np.load(tmp_path / "npy" / f"mode_fp32_layer_1_sample_{sample}.npy")
        assert found.shape == (1, length, 32)
        with np.load(
            tmp_path / "npz" / f"first_layer_io_all_modes_sample_{sample}.npz", allow_pickle=False
        ) as values:
            assert values["mode_fp32_input"].shape == (1, length, 32)


def test_a_model_without_mixers_gives_the_outputs_of_its_layers(build: Any, tmp_path: Path) -> None:
    run = capture(build("llama"), tmp_path / "run", "fp32")
    export("layer-npy", run, tmp_path / "npy")
    export("first-layer-npz", run, tmp_path / "npz")
    stats = json.loads((tmp_path / "npy" / "mode_fp32_stats.json").read_text())
    assert stats["layers"]["0"]["tensor"] == "layers.0/forward/output"
    stats = json.loads((tmp_path / "npz" / "first_layer_io_all_modes_stats.json").read_text())
    assert stats["tensors"]["fp32"][1] == "layers.0/forward/output"


def test_a_selection_can_ask_for_the_residual_sum(mamba: Any, tmp_path: Path) -> None:
    run = capture(mamba, tmp_path / "run", "fp32")
    export("layer-npy", run, tmp_path / "out", "layers.1/forward/output")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mode_fp32_layer_1.npy", "mode_fp32_stats.json",
    ]  # fmt: skip
    stats = json.loads((tmp_path / "out" / "mode_fp32_stats.json").read_text())
    assert stats["layers"]["1"]["tensor"] == "layers.1/forward/output"


def test_modes_are_collected_in_one_folder(mamba: Any, tmp_path: Path) -> None:
    for mode in ("fp32", "bf16", "mxfp4"):
        run = capture(mamba, tmp_path / mode, mode)
        for name in LAYOUTS:
            export(name, run, tmp_path / name)
            with pytest.raises(RunExists, match="already"):
                export(name, run, tmp_path / name)
    with np.load(
        tmp_path / "first-layer-npz" / "first_layer_io_all_modes.npz", allow_pickle=False
    ) as values:
        assert sorted(values) == sorted(
            f"mode_{mode}_{what}"
            for mode in ("fp32", "bf16", "mxfp4")
            for what in ("input", "output")
        )
    stats = json.loads(
        (tmp_path / "first-layer-npz" / "first_layer_io_all_modes_stats.json").read_text()
    )
    assert list(stats["modes"]) == ["fp32", "bf16", "mxfp4"]


@pytest.mark.parametrize("lengths", [(6,), (6, 6, 6), (5, 8, 2)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_exported_comes_back_as_it_was(
    mamba: Any, tmp_path: Path, name: str, lengths: tuple[int, ...]
) -> None:
    for mode in ("fp32", "bf16", "fp16"):
        capture(mamba, tmp_path / mode, mode, lengths)
        export(name, tmp_path / mode, tmp_path / "files")
    moved = load(name, tmp_path / "files", tmp_path / "back")
    assert moved.records == 3 * 2 * len(lengths)
    for mode in ("fp32", "bf16", "fp16"):
        with (
            tensortap.open_run(tmp_path / mode) as before,
            tensortap.open_run(tmp_path / "back" / mode) as after,
        ):
            assert after.complete
            assert (after.info.mode, after.info.format) == (mode, before.info.format)
            said = after.info.metadata["mode"]
            assert (said["basis"], said["family"]) == ("native", "generic")
            assert after.steps == list(range(len(lengths)))
            for record in after.records():
                wanted = before.tensor(record.name, step=record.at.step)
                found = after.piece(record)
                assert found.dtype is wanted.dtype
                assert torch.equal(found, wanted)
                assert record.stats is not None
                assert record.stats.mean == pytest.approx(wanted.double().mean().item())


def test_a_single_mode_is_imported_as_the_run_itself(mamba: Any, tmp_path: Path) -> None:
    export("layer-npy", capture(mamba, tmp_path / "run", "mxfp4"), tmp_path / "files")
    load("layer-npy", tmp_path / "files", tmp_path / "back")
    with tensortap.open_run(tmp_path / "back") as run:
        assert run.names() == ["layers.0.mixer/forward/output", "layers.1.mixer/forward/output"]
    sink = MemorySink()
    layout("layer-npy").load(tmp_path / "files", sink, ignore)
    assert len(sink.records) == 4
    assert sink.closed


def test_several_modes_fit_in_run_directories_only(tmp_path: Path) -> None:
    for mode in ("fp32", "0"):
        np.save(tmp_path / f"mode_{mode}_layer_0.npy", np.zeros((1, 2, 4), dtype=np.float32))
    with pytest.raises(RunError, match=r"several runs \(0, fp32\)"):
        layout("layer-npy").load(tmp_path, MemorySink(), ignore)


def test_files_of_the_older_scripts_are_read_though_their_json_is_empty(tmp_path: Path) -> None:
    """Their layer was the mixer's output; their statistics were never filled in."""
    values = np.random.default_rng(1).standard_normal((1, 5, 8)).astype(np.float16)
    np.save(tmp_path / "mode_2-1_layer_23.npy", values)
    (tmp_path / "mode_2-1_stats.json").write_text("{}")
    load("layer-npy", tmp_path, tmp_path / "run")
    with tensortap.open_run(tmp_path / "run") as run:
        assert run.names() == ["layers.23.mixer/forward/output"]
        assert run.info.mode == "2-1"
        assert run.info.metadata["mode"]["basis"] == "unknown"
        np.testing.assert_array_equal(run.tensor(run.names()[0]).numpy(), values)


def test_the_older_npz_is_read_without_its_new_fields(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    values = {
        f"mode_{mode}_{what}": generator.standard_normal((1, 5, 8)).astype(np.float32)
        for mode in ("fp32", "2-0")
        for what in ("input", "output")
    }
    np.savez_compressed(tmp_path / "first_layer_io_all_modes.npz", **values)
    document = {"timestamp": "2025-01-01 10:00:00", "model": "quamba-130m-w8a8", "seq_len": 5}
    (tmp_path / "first_layer_io_all_modes_stats.json").write_text(json.dumps(document))
    load("first-layer-npz", tmp_path, tmp_path / "runs")
    for mode in ("fp32", "2-0"):
        with tensortap.open_run(tmp_path / "runs" / mode) as run:
            assert run.names() == [MIXER, "layers.0/forward/input"]
            assert run.info.metadata["model"] == "quamba-130m-w8a8"
            np.testing.assert_array_equal(run.tensor(MIXER).numpy(), values[f"mode_{mode}_output"])


def test_one_npz_is_imported_by_its_own_path(tmp_path: Path) -> None:
    values = {f"mode_fp32_{what}": np.ones((1, 2, 3), np.float32) for what in ("input", "output")}
    for name in ("first", "other"):
        np.savez_compressed(tmp_path / f"{name}.npz", **values)
    load("first-layer-npz", tmp_path / "first.npz", tmp_path / "run")
    with tensortap.open_run(tmp_path / "run") as run:
        assert len(list(run.records())) == 2


@pytest.mark.parametrize("name", ["mode_x_layer_0.npy", "first.npz"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path / "ran").touch, ()

    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    which = "layer-npy" if name.endswith("npy") else "first-layer-npz"
    with pytest.raises(RunError, match=f"{name} is no numpy file without pickles"):
        load(which, tmp_path, tmp_path / "run")
    np.save(tmp_path / "mode_y_layer_0.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(RunError, match="without pickles"):
        load("layer-npy", tmp_path, tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="mode_<m>"):
        load(name, tmp_path, tmp_path / "run")


@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics_alone_cannot_be_exported(mamba: Any, tmp_path: Path, name: str) -> None:
    with tensortap.attach(mamba, tmp_path / "run", select="layers.*"), torch.no_grad():
        mamba(input_ids=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(RunError, match="statistics only; capture with values='full'"):
        export(name, tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_without_layers_cannot_be_exported(build: Any, tmp_path: Path, name: str) -> None:
    model = build("llama")
    with tensortap.attach(model, tmp_path / "run", select="lm_head/forward/*", values="full"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(RunError, match="nothing to export"):
        export(name, tmp_path / "run", tmp_path / "out")


def test_a_mode_whose_name_is_no_file_name_is_refused(mamba: Any, tmp_path: Path) -> None:
    odd = modes.Mode("../etc", "generic", "has an odd name", modes.get("bf16", "generic").apply)
    with (
        modes.apply(mamba, odd),
        tensortap.attach(mamba, tmp_path / "run", select="layers.*", values="full"),
        torch.no_grad(),
    ):
        mamba(input_ids=torch.ones(1, 4, dtype=torch.long))
    for name in LAYOUTS:
        with pytest.raises(RunError, match="cannot be part of a file's name"):
            export(name, tmp_path / "run", tmp_path / "out")
