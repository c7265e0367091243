"""examples/train_llama, run as its README runs it: real processes, the real Megatron-core.

A launch takes seconds, so one run serves several tests.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys

import numpy as np
import pytest
from examples.train_llama import options
from tests.megatron.train_llama_runs import EXAMPLE, SMALL, launch, refusal, save_llama, train

import tensortap

transformers = pytest.importorskip("transformers")

# Two workers share the launches; more at once would slow each other down on a small machine.
layouts = pytest.mark.xdist_group("train-llama-layouts")
settings = pytest.mark.xdist_group("train-llama-settings")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def plain(hf_folder):
    return train("--steps", "4", "--hf-model", hf_folder)


@pytest.fixture(scope="module")
def drawn():
    """Weights drawn from the seed, and what Python imported."""
    ran = launch(
        [sys.executable, "-X", "importtime", EXAMPLE / "train.py", *SMALL, "--steps", "12"]
    )
    assert ran.status == 0, ran.err
    return ran


@pytest.fixture(scope="module")
def saved(hf_folder, tmp_path_factory):
    """Two steps of the older launch line: the folder it wrote to, the line, and what it printed."""
    folder = tmp_path_factory.mktemp("saved")
    board = folder / "board" if importlib.util.find_spec("tensorboard") else ""
    (folder / "text").write_bytes(options.TEXT.read_bytes())
    line = [EXAMPLE / "train_llama32_1b.sh", folder / "ckpt", board, hf_folder, folder / "text"]
    line += ["fp32", *SMALL, "--lr", "0.001"]
    off = {"TENSOR_SAVE_ENABLED": "0", "TENSOR_SAVE_DIR": str(folder / "logs")}
    ran = launch([*line, "--steps", "2"], PYTHON=sys.executable, NPROC="1", **off)
    assert ran.status == 0, ran.err
    shutil.copytree(folder / "ckpt", folder / "copy")
    return folder, line, ran


@pytest.fixture(scope="module")
def over_two(hf_folder):
    """Tensor parallel: the options, and the run that is not tapped."""
    start = ["--steps", "4", "--hf-model", hf_folder, "--tp", "2"]
    return start, train(*start, processes=2)


@layouts
def test_the_loss_falls(drawn):
    assert len(drawn.losses) == 12
    # 256 bytes, all as likely: ln 256. Text is not.
    assert drawn.losses[0] == pytest.approx(np.log(256), abs=0.1)
    assert drawn.losses[-1] < drawn.losses[0] - 1.5


@layouts
def test_plain_training_does_not_import_tensortap(drawn):
    imported = [line.rpartition("|")[2].strip() for line in drawn.err.splitlines()]
    assert "megatron.core" in imported
    assert not [name for name in imported if name.startswith("tensortap")]


@layouts
def test_two_tensor_parallel_processes_train_as_one_does(over_two, plain):
    _, ran = over_two
    assert ran.losses == pytest.approx(plain.losses, abs=3e-5)
    assert ran.norms == pytest.approx(plain.norms, abs=3e-4)


@layouts
@pytest.mark.parametrize("layout", [["--pp", "2"], ["--cp", "2"], []], ids=["pp", "cp", "dp"])
def test_two_processes_train_as_one_does(layout, hf_folder, plain):
    ran = train("--steps", "4", "--hf-model", hf_folder, *layout, processes=2)
    assert ran.losses == pytest.approx(plain.losses, abs=3e-5)
    assert ran.norms == pytest.approx(plain.norms, abs=3e-4)


@layouts
def test_weights_drawn_from_the_seed_do_not_depend_on_tensor_or_sequence_parallelism(drawn):
    ran = train("--steps", "3", "--tp", "2", "--sequence-parallel", processes=2)
    assert ran.losses == pytest.approx(drawn.losses[:3], abs=3e-5)
    assert ran.norms == pytest.approx(drawn.norms[:3], abs=3e-4)


@layouts
def test_capturing_changes_no_loss_and_records_every_rank(tmp_path, hf_folder, over_two):
    start, untapped = over_two
    environment = {"TENSOR_SAVE_ENABLED": "1", "TENSOR_SAVE_DIR": str(tmp_path)}
    tapped = train(*start, processes=2, **environment)
    assert tapped.losses == untapped.losses
    assert tapped.norms == untapped.norms
    (written,) = tmp_path.glob("*/run.json")
    run = tensortap.open_run(written.parent)
    assert run.complete
    assert sorted(run.ranks) == [0, 1]
    query = run.records("layers.1.attn.core/forward/query", step=1, rank=1)
    assert {record.payload is not None for record in query} == {True}
    weights = run.tensor("embed/param/weight", step=0)
    expected = transformers.LlamaForCausalLM.from_pretrained(hf_folder).model.embed_tokens.weight
    assert weights.equal(expected)


@settings
def test_the_older_launch_line_trains_and_saves(saved, plain):
    folder, _, ran = saved
    assert ran.losses == plain.losses[:2]
    assert (folder / "ckpt" / "iter_0000002").is_dir()


@settings
def test_tensorboard_shows_the_printed_losses(saved):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _, ran = saved
    events = accumulator.EventAccumulator(str(folder / "board")).Reload()
    shown = [event.value for event in events.Scalars("loss")]
    assert shown == pytest.approx(ran.losses, abs=1e-5)
    assert [event.step for event in events.Scalars("grad_norm")] == [0, 1]


@settings
def test_capturing_that_is_switched_off_leaves_plain_training(saved, plain):
    folder, _, ran = saved
    assert ran.norms == plain.norms[:2]
    assert not (folder / "logs").exists()


@settings
def test_a_resumed_run_continues_as_if_it_had_not_stopped(saved, plain):
    folder, line, _ = saved
    rest = launch([*line, "--steps", "4"], PYTHON=sys.executable, NPROC="1")
    assert rest.losses == plain.losses[2:], rest.err
    assert rest.norms == plain.norms[2:]
    assert "resumed after step 1" in rest.out
    names = sorted(path.name for path in (folder / "ckpt").glob("iter_*"))
    assert names == ["iter_0000002", "iter_0000004"]


@settings
def test_a_checkpoint_is_resumed_by_another_number_of_ranks(saved, hf_folder, plain):
    start = ["--steps", "4", "--hf-model", hf_folder, "--checkpoint", saved[0] / "copy"]
    rest = train(*start, "--tp", "2", processes=2)
    assert rest.losses == pytest.approx(plain.losses[2:], abs=3e-5)


@settings
def test_the_older_launch_line_explains_its_arguments():
    ran = launch([EXAMPLE / "train_llama32_1b.sh", "only", "two"])
    assert ran.status == 2
    assert "CHECKPOINT_DIR TENSORBOARD_DIR TOKENIZER_OR_MODEL_DIR DATA_PREFIX DTYPE" in ran.err


@settings
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_train_nearly_as_fp32_does(dtype, hf_folder, plain):
    ran = train("--steps", "4", "--hf-model", hf_folder, "--dtype", dtype)
    assert ran.losses != plain.losses
    assert ran.losses == pytest.approx(plain.losses, abs=0.03)


@settings
def test_a_number_format_is_chosen_by_the_environment(hf_folder, plain):
    ran = train("--steps", "4", "--hf-model", hf_folder, CUSTOM_QUANT_TYPE="mxfp4")
    assert ran.losses != plain.losses
    assert ran.losses == pytest.approx(plain.losses, abs=0.5)


@settings
def test_an_unknown_number_format_is_one_line_that_lists_the_known():
    line = refusal(CUSTOM_QUANT_TYPE="fp3")
    assert "fp3" in line
    assert "mxfp4" in line


@settings
def test_megatron_that_is_not_installed_is_one_line_that_says_how_to_install_it(tmp_path):
    missing = "raise ModuleNotFoundError(\"No module named 'megatron'\", name='megatron')"
    (tmp_path / "megatron.py").write_text(missing)
    line = refusal(PYTHONPATH=str(tmp_path))
    assert line.startswith("train.py: No module named 'megatron': pip install")
    assert "megatron-core==0.16.1" in line
