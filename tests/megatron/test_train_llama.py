"""examples/train_llama, run as its README runs it: real processes, the real Megatron-core."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from examples.train_llama import data, hf_weights, model, options
from examples.train_llama.cpu import run_on_cpu

import tensortap

transformers = pytest.importorskip("transformers")

# Several launches at once would slow each other down on a small machine.
pytestmark = pytest.mark.xdist_group("dist")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_llama"
SMALL = ["--micro-batch", "2", "--global-batch", "4", "--seq-length", "32"]


class Ran(NamedTuple):
    losses: list[float]
    norms: list[float]
    out: str
    err: str
    status: int


def launch(command, **environment) -> Ran:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TENSOR", "CUSTOM_QUANT"))}
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [str(word) for word in command],
        env=kept,
        check=False,
        timeout=240,
        capture_output=True,
        text=True,
    )
    losses = re.findall(r"step +\d+  loss ([\d.]+)", done.stdout)
    norms = re.findall(r"grad norm ([\d.]+)", done.stdout)
    numbers = [[float(text) for text in column] for column in (losses, norms)]
    return Ran(*numbers, done.stdout, done.stderr, done.returncode)


def python(processes):
    if processes == 1:
        return [sys.executable]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun]


def train(*arguments, processes=1, **environment) -> Ran:
    ran = launch([*python(processes), EXAMPLE / "train.py", *SMALL, *arguments], **environment)
    assert ran.status == 0, ran.err
    return ran


def refusal(*arguments, **environment) -> str:
    """What train.py says when it refuses: one line."""
    ran = launch([sys.executable, EXAMPLE / "train.py", *SMALL, *arguments], **environment)
    assert ran.status == 2
    assert ran.losses == []
    (line,) = ran.err.splitlines()
    return line


def save_llama(folder, **changes):
    """A Hugging Face Llama whose weights are large enough for errors to show."""
    sizes = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name else 0, 0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def plain(hf_folder):
    return train("--steps", "4", "--hf-model", hf_folder)


def test_the_loss_falls_and_plain_training_does_not_import_tensortap():
    ran = launch(
        [sys.executable, "-X", "importtime", EXAMPLE / "train.py", *SMALL, "--steps", "12"]
    )
    assert ran.status == 0, ran.err
    assert len(ran.losses) == 12
    # 256 bytes, all as likely: ln 256. Text is not.
    assert ran.losses[0] == pytest.approx(np.log(256), abs=0.1)
    assert ran.losses[-1] < ran.losses[0] - 1.5
    imported = [line.rpartition("|")[2].strip() for line in ran.err.splitlines()]
    assert "megatron.core" in imported
    assert not [name for name in imported if name.startswith("tensortap")]


@pytest.mark.parametrize(
    "layout",
    [["--tp", "2"], ["--tp", "2", "--sequence-parallel"], ["--pp", "2"], ["--cp", "2"], []],
    ids=["tp", "tp-sequence-parallel", "pp", "cp", "dp"],
)
def test_two_processes_train_as_one_does(layout, hf_folder, plain):
    ran = train("--steps", "4", "--hf-model", hf_folder, *layout, processes=2)
    assert ran.losses == pytest.approx(plain.losses, abs=3e-5)
    assert ran.norms == pytest.approx(plain.norms, abs=3e-4)


def test_weights_drawn_from_the_seed_do_not_depend_on_tensor_parallelism():
    one, two = train("--steps", "2"), train("--steps", "2", "--tp", "2", processes=2)
    assert two.losses == pytest.approx(one.losses, abs=3e-5)
    assert train("--steps", "2", "--seed", "2").losses != one.losses


def test_a_resumed_run_continues_as_if_it_had_not_stopped(tmp_path, hf_folder, plain):
    start = ["--hf-model", hf_folder, "--checkpoint", tmp_path]
    first = train("--steps", "2", *start)
    assert first.losses == plain.losses[:2]
    rest = train("--steps", "4", *start)
    assert rest.losses == plain.losses[2:]
    assert rest.norms == plain.norms[2:]
    assert "resumed after step 1" in rest.out
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000004"]


def test_a_checkpoint_is_resumed_by_another_number_of_ranks(tmp_path, hf_folder, plain):
    train("--steps", "2", "--hf-model", hf_folder, "--checkpoint", tmp_path)
    rest = train(
        "--steps", "4", "--checkpoint", tmp_path, "--hf-model", hf_folder, "--tp", "2", processes=2
    )
    assert rest.losses == pytest.approx(plain.losses[2:], abs=3e-5)


CASES = {
    "grouped": {},
    "one_group": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "padded": {"vocab_size": 255, "rms_norm_eps": 1e-3},
    "llama3_rope": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


@pytest.mark.parametrize("tp", [1, 2])
def test_hugging_face_weights_give_hugging_faces_logits(tp, tmp_path):
    tokens = torch.randint(255, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    models = {name: save_llama(tmp_path / name, **changes) for name, changes in CASES.items()}
    script = Path(__file__).with_name("train_llama_logits.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp}"]
    ran = launch([sys.executable, *torchrun, script, tmp_path, tp])
    assert ran.status == 0, ran.err
    for name, hf_model in models.items():
        found = torch.load(tmp_path / name / "logits.pt")
        with torch.no_grad():
            expected = hf_model(tokens).logits
        assert found.shape == expected.shape
        assert expected.std() > 0.5
        assert (found - expected).abs().max() / expected.abs().max() < 1e-5, name


COUNT = """
import sys, torch, torch.distributed as dist
from examples.train_llama import model, options
from examples.train_llama.cpu import run_on_cpu
from megatron.core import parallel_state

run_on_cpu()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
chosen = options.parse(["--size", "1b"])
llama = model.choose_model(chosen)
with torch.device("meta"):
    stage = model.build_stage(llama, model.make_config(llama, chosen), "local", 8192)
print(sum(parameter.numel() for parameter in stage.parameters()))
"""


def test_the_1b_size_is_llama_3_2_1b():
    ran = launch([sys.executable, "-c", COUNT])
    assert ran.status == 0, ran.err
    # The number of parameters Meta's release has.
    assert int(ran.out) == 1_235_814_400


def test_fused_attention_rows_are_interleaved_by_query_group():
    heads, groups, dim, hidden = 6, 2, 4, 5
    q, k, v = (torch.randn(n * dim, hidden) for n in (heads, groups, groups))
    rows = []
    for group in range(groups):
        for head in range(3 * group, 3 * group + 3):
            rows += [q[head * dim + i] for i in range(dim)]
        rows += [k[group * dim + i] for i in range(dim)]
        rows += [v[group * dim + i] for i in range(dim)]
    assert torch.equal(hf_weights.interleave_groups(q, k, v, groups), torch.stack(rows))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "a gpt2 model, not a Llama"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "no rotary embedding like"),
        ({"attention_bias": True}, "biases are not built here"),
    ],
)
def test_a_model_of_another_kind_is_refused_with_its_reason(changes, said, tmp_path):
    config = json.loads(transformers.LlamaConfig().to_json_string(use_diff=False))
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=said):
        model.Llama.from_folder(tmp_path)


def test_an_indexed_dataset_trains_as_the_text_it_was_made_of(tmp_path, hf_folder, plain):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    text = np.frombuffer(options.TEXT.read_bytes(), dtype=np.uint8)
    builder = IndexedDatasetBuilder(str(tmp_path / "play.bin"), dtype=np.uint16)
    for document in np.array_split(text, 7):
        builder.add_document(document.astype(np.uint16), [len(document)])
    builder.finalize(str(tmp_path / "play.idx"))
    ran = train("--steps", "4", "--hf-model", hf_folder, "--data", tmp_path / "play")
    assert ran.losses == plain.losses


def test_a_text_goes_through_the_models_own_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = options.TEXT.read_text()[:300].split()
    vocabulary = {word: index for index, word in enumerate(["?", *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    (tmp_path / "text").write_text(" ".join(words))
    for chosen in (
        {"hf_model": tmp_path, "tokenizer": None},
        {"hf_model": None, "tokenizer": tmp_path},
    ):
        given = Namespace(data=str(tmp_path / "text"), seq_length=8, **chosen)
        expected = [vocabulary[word] for word in words]
        assert data.load_corpus(given, len(vocabulary)).ids.tolist() == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_train_nearly_as_fp32_does(dtype, hf_folder, plain):
    ran = train("--steps", "4", "--hf-model", hf_folder, "--dtype", dtype)
    assert ran.losses != plain.losses
    assert ran.losses == pytest.approx(plain.losses, abs=0.03)


def test_tensorboard_shows_the_printed_losses(tmp_path, hf_folder, plain):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train("--steps", "2", "--hf-model", hf_folder, "--tensorboard", tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    shown = [event.value for event in events.Scalars("loss")]
    assert shown == pytest.approx(plain.losses[:2], abs=1e-5)
    assert [event.step for event in events.Scalars("grad_norm")] == [0, 1]


def test_the_older_launch_line_trains_saves_and_resumes(tmp_path, hf_folder, plain):
    board = tmp_path / "board" if importlib.util.find_spec("tensorboard") else ""
    (tmp_path / "play").write_bytes(options.TEXT.read_bytes())
    line = [EXAMPLE / "train_llama32_1b.sh", tmp_path / "ckpt", board, hf_folder]
    line += [tmp_path / "play", "fp32", *SMALL, "--lr", "0.003"]
    first = launch([*line, "--steps", "2"], PYTHON=sys.executable, NPROC="1")
    second = launch([*line, "--steps", "4"], PYTHON=sys.executable, NPROC="1")
    assert first.losses + second.losses == plain.losses, first.err + second.err
    assert (tmp_path / "ckpt" / "iter_0000004").is_dir()
    assert board == "" or list(board.iterdir())


def test_the_older_launch_line_explains_its_arguments():
    ran = launch([EXAMPLE / "train_llama32_1b.sh", "only", "two"])
    assert ran.status == 2
    assert "CHECKPOINT_DIR TENSORBOARD_DIR TOKENIZER_OR_MODEL_DIR DATA_PREFIX DTYPE" in ran.err


def test_capturing_changes_no_loss_and_records_every_rank(tmp_path, hf_folder, plain):
    environment = {"TENSOR_SAVE_ENABLED": "1", "TENSOR_SAVE_DIR": str(tmp_path)}
    start = ["--steps", "2", "--hf-model", hf_folder, "--tp", "2"]
    untapped = train(*start, processes=2)
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
    assert torch.equal(weights, expected)


def test_capturing_that_is_switched_off_leaves_plain_training(tmp_path, hf_folder, plain):
    environment = {"TENSOR_SAVE_ENABLED": "0", "TENSOR_SAVE_DIR": str(tmp_path)}
    ran = train("--steps", "2", "--hf-model", hf_folder, **environment)
    assert ran.losses == plain.losses[:2]
    assert list(tmp_path.iterdir()) == []


def test_a_number_format_is_chosen_by_the_environment(hf_folder, plain):
    start = ["--steps", "4", "--hf-model", hf_folder]
    quantised = train(*start, CUSTOM_QUANT_TYPE="mxfp4")
    assert quantised.losses != plain.losses
    assert quantised.losses == pytest.approx(plain.losses, abs=0.5)
    finer = train(*start, CUSTOM_QUANT_TYPE="hifp8")
    error = [np.abs(np.subtract(ran.losses, plain.losses))[0] for ran in (finer, quantised)]
    assert 0 < error[0] < error[1]


def test_an_unknown_number_format_is_one_line_that_lists_the_known():
    line = refusal(CUSTOM_QUANT_TYPE="fp3")
    assert "fp3" in line
    assert "mxfp4" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "fp8"], "--dtype fp8 needs a GPU and Transformer Engine"),
        (["--spec", "te"], "--spec te needs a GPU and Transformer Engine"),
        (["--data", "missing"], "no such file, and no missing.bin with missing.idx"),
        (["--seq-length", "1000000"], "too few for one sample"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(arguments, said):
    assert said in refusal(*arguments)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    save_llama(tmp_path, vocab_size=64)
    assert "a vocabulary of 64" in refusal("--hf-model", tmp_path)


def test_a_large_token_far_into_the_data_is_refused_when_it_is_drawn():
    corpus = data.Corpus(np.arange(300), vocab_size=256)
    corpus.check(corpus.ids[:256])
    with pytest.raises(ValueError, match="token id 256, the model a vocabulary of 256"):
        corpus.check(corpus.ids[1:257])


def test_tensorboard_that_is_not_installed_is_said_before_training(tmp_path):
    (tmp_path / "tensorboard.py").write_text("raise ImportError")
    line = refusal("--tensorboard", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert "pip install tensorboard" in line


@pytest.mark.parametrize("arguments", ["--cp 2", "--tp 2 --sequence-parallel"])
def test_gpus_without_transformer_engine_are_told_what_needs_it(arguments, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="need Transformer Engine"):
        model.choose_spec(options.parse(["--spec", "local", *arguments.split()]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--tp 2", "--nproc-per-node 2"),
        ("--sequence-parallel", "give --tp 2"),
        ("--global-batch 6", "no multiple of --micro-batch 4"),
        ("--hf-model nowhere", "nowhere is no folder"),
        ("--steps 0", "'0' is not a positive whole number"),
        ("--dtype fp4", "choose from"),
    ],
)
def test_options_that_contradict_are_refused_in_words(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        options.parse(arguments.split())
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_the_readme_names_every_option_and_its_commands_are_valid(monkeypatch):
    text = (EXAMPLE / "README.md").read_text()
    listed = set(re.findall(r"`(--[a-z-]+)`", text[text.index("## Options") :]))
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        options.parse(["--help"])
    known = set(re.findall(r"--[a-z-]+", shown.getvalue())) - {"--help"}
    assert known <= listed

    monkeypatch.setenv("WORLD_SIZE", "8")
    commands = re.findall(r"examples/train_llama/train\.py(.*?)(?:\n|`)", text)
    assert len(commands) > 5
    for command in commands:
        words = [{"TOKENIZER_DIR": ".", "DTYPE": "fp8"}.get(w, w) for w in command.split()]
        batch = [] if "--global-batch" in words else ["--global-batch", "64"]
        options.parse([*words, *batch])


def test_without_a_gpu_cuda_means_the_cpu_until_the_block_ends():
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    before = (torch.cuda.current_device, random._set_cuda_rng_state, DotProductAttention.forward)
    with run_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.ones(2).cuda().device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    after = (torch.cuda.current_device, random._set_cuda_rng_state, DotProductAttention.forward)
    assert after == before
    assert torch.ones(2).type() == "torch.FloatTensor"


def test_with_a_gpu_nothing_is_redirected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    with run_on_cpu():
        assert torch.cuda.current_device is before
