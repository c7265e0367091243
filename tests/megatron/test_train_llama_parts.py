"""What examples/train_llama is made of: weights, data, options, and Megatron on the CPU."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from examples.train_llama import data, hf_weights, model, options, report
from examples.train_llama.cpu import run_on_cpu
from tests.megatron import quantize_layers as built
from tests.megatron.train_llama_logits import write_logits
from tests.megatron.train_llama_runs import EXAMPLE, launch, python, save_llama

import tensortap

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.xdist_group("train-llama-parts")


@pytest.fixture
def one_rank():
    with built.ranks():
        yield


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


@pytest.fixture
def cases(tmp_path):
    """Folders of models beside tokens for them, and the logits Hugging Face computes."""
    tokens = torch.randint(255, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    expected = {}
    for name, changes in CASES.items():
        with torch.no_grad():
            expected[name] = save_llama(tmp_path / name, **changes)(tokens).logits
    return tmp_path, expected


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert expected.std() > 0.5
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_hugging_face_weights_give_hugging_faces_logits(cases, one_rank):
    folder, expected = cases
    write_logits(folder, tp=1)
    for name, logits in expected.items():
        assert_close(torch.load(folder / name / "logits.pt"), logits)


def test_over_two_ranks_the_logits_are_the_same_and_records_mark_the_padding(cases):
    folder, expected = cases
    script = Path(__file__).with_name("train_llama_logits.py")
    ran = launch([*python(2), script, folder, 2])
    assert ran.status == 0, ran.err
    for name, logits in expected.items():
        assert_close(torch.load(folder / name / "logits.pt"), logits)
        run = tensortap.open_run(folder / name / "run")
        valid = [dict(record.placement.valid) for record in run.records("lm_head/forward/output")]
        assert valid == 2 * [{2: 255} if name == "padded" else {}]
        # Megatron's are [sequence, batch, vocabulary].
        captured = run.tensor("lm_head/forward/output")[..., : logits.shape[-1]]
        assert_close(captured.transpose(0, 1), logits)


def test_the_1b_size_is_llama_3_2_1b(one_rank):
    chosen = options.parse(["--size", "1b"])
    llama = model.choose_model(chosen)
    with torch.device("meta"):
        stage = model.build_stage(llama, model.make_config(llama, chosen), "local", 8192)
    # The number of parameters Meta's release has.
    assert sum(parameter.numel() for parameter in stage.parameters()) == 1_235_814_400


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


def test_the_text_beside_the_example_is_plain_ascii_in_lines_of_80():
    text = options.TEXT.read_text(encoding="ascii")
    assert 40_000 < len(text) < 50_000
    assert max(map(len, text.splitlines())) <= 80
    for article in ("ARTICLE VII", "AMENDMENT XXVII"):
        assert f"\n{article}\n" in text


def test_an_indexed_dataset_holds_the_tokens_of_the_text_it_was_made_of(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    text = np.frombuffer(options.TEXT.read_bytes(), dtype=np.uint8)
    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.uint16)
    for document in np.array_split(text, 7):
        builder.add_document(document.astype(np.uint16), [len(document)])
    builder.finalize(str(tmp_path / "text.idx"))
    for source in (tmp_path / "text", options.TEXT):
        assert data.load_corpus(options.parse(["--data", str(source)]), 256).ids.tolist() == [*text]


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


def test_samples_depend_on_the_seed_and_the_step_alone(one_rank):
    def tokens(step, *arguments):
        corpus = data.Corpus(np.arange(10_000), vocab_size=10_000)
        drawn = data.microbatches(corpus, options.parse([*arguments]), step, torch.device("cpu"))
        return torch.cat([batch["tokens"] for batch in drawn])

    first = tokens(3)
    assert torch.equal(tokens(3, "--micro-batch", "2"), first)
    assert not torch.equal(tokens(4), first)
    assert not torch.equal(tokens(3, "--seed", "2"), first)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "missing"], "no such file, and no missing.bin with missing.idx"),
        (["--seq-length", "1000000"], "too few for one sample"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        data.load_corpus(options.parse(arguments), 256)


def test_tokens_beyond_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="a vocabulary of 64"):
        data.load_corpus(options.parse([]), 64)


def test_a_large_token_far_into_the_data_is_refused_when_it_is_drawn():
    corpus = data.Corpus(np.arange(300), vocab_size=256)
    corpus.check(corpus.ids[:256])
    with pytest.raises(ValueError, match="token id 256, the model a vocabulary of 256"):
        corpus.check(corpus.ids[1:257])


@pytest.mark.parametrize("arguments", [["--dtype", "fp8"], ["--spec", "te"]])
def test_what_needs_a_gpu_and_transformer_engine_says_so(arguments):
    with pytest.raises(ValueError, match=f"{' '.join(arguments)} needs a GPU and Transformer"):
        model.choose_spec(options.parse(arguments))


@pytest.mark.parametrize("arguments", ["--cp 2", "--tp 2 --sequence-parallel"])
def test_gpus_without_transformer_engine_are_told_what_needs_it(arguments, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="need Transformer Engine"):
        model.choose_spec(options.parse(["--spec", "local", *arguments.split()]))


def test_tensorboard_that_is_not_installed_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        report.Report(tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("--data x: no such file."), "train.py: --data x: no such file.\n"),
        (ImportError("Without x"), f"train.py: Without x: {options.INSTALL}\n"),
        (tensortap.TensortapError("Pin it."), "train.py: Pin it.\n"),
    ],
)
def test_what_a_user_can_get_wrong_ends_in_one_line(error, said, capsys):
    with pytest.raises(SystemExit) as stopped, options.one_line_errors():
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err == said


def test_a_mistake_in_the_code_is_no_line_but_a_traceback():
    with pytest.raises(AttributeError), options.one_line_errors():
        raise AttributeError


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
    commands = re.findall(r"examples/train_llama/train\.py(.*?)(?:\n|`|\|)", text)
    assert len(commands) > 5
    for command in commands:
        words = [{"TOKENIZER_DIR": ".", "DTYPE": "fp8"}.get(w, w) for w in command.split()]
        batch = [] if "--global-batch" in words else ["--global-batch", "64"]
        options.parse([*words, *batch])


def test_without_a_gpu_cuda_means_the_cpu_until_the_block_ends():
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    def patched():
        ours = (torch.cuda.current_device, torch.autograd._engine_run_backward)
        return (*ours, random._set_cuda_rng_state, DotProductAttention.forward)

    before = patched()
    with run_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.ones(2).cuda().device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert patched() == before
    assert torch.ones(2).type() == "torch.FloatTensor"


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_without_a_gpu_recomputed_activations_give_the_same_gradients(granularity, one_rank):
    """Megatron makes its causal mask with `device="cuda"`, here while backward is running."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    uniform = {"recompute_method": "uniform", "recompute_num_layers": 1}
    batch = {**built.batch(), "attention_mask": None}
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}

    def gradients(**changes):
        network = built.gpt(**dropout, **changes)
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        return built.gradients(network, **batch)

    exact = gradients()
    more = uniform if granularity == "full" else {}
    found = gradients(recompute_granularity=granularity, **more)
    assert len(exact) > 10
    for name, gradient in exact.items():
        assert torch.equal(found[name], gradient), name


def test_without_a_gpu_an_old_torch_is_refused(monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance")
    before = torch.cuda.current_device
    with pytest.raises(ImportError, match=r"Without a GPU this needs torch 2\.6, not"):
        run_on_cpu()
    assert torch.cuda.current_device is before


def test_with_a_gpu_nothing_is_redirected(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device
    with run_on_cpu():
        assert torch.cuda.current_device is before
