"""`tensortap neuron layers`: every layer of a Hugging Face model, as a run and as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tests.neuron.command.conftest import KINDS, model_of
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import tensortap
from tensortap_neuron.command import calling, capturing
from tensortap_neuron.command.naming import places_of

TEXT = "Paris is"
OUTPUTS = [f"layer_{number}_output" for number in range(3)]


def hidden_states(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """What transformers itself says of the embedding and every layer; the last one is normed.

    A Mamba leaves the embedding out.
    """
    with torch.no_grad():
        return list(model(input_ids=ids, output_hidden_states=True).hidden_states)


def the_ids(text: str = TEXT) -> torch.Tensor:
    """Without a tokenizer the bytes of the text are its tokens."""
    return torch.tensor([list(text.encode())])


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_decoder_is_what_transformers_computes(tt, checkpoint, tmp_path, kind):
    code, printed, _ = tt(
        "neuron", "layers", "--model", checkpoint(kind), "--prompt", TEXT, "--out", tmp_path / "out"
    )
    assert code == 0
    states = hidden_states(model_of(kind), the_ids())
    folder = tmp_path / "out" / "prompt-0"
    with tensortap.open_run(folder / "run") as run:
        assert run.complete
        assert run.coverage()["gaps"] == []
        assert set(run.names()) == {
            "embed/forward/output", "final_norm/forward/output",
            "embed/forward/input", "final_norm/forward/input",
            *(f"layers.{number}/forward/output" for number in range(3)),
        }  # fmt: skip
        found = [run.tensor(f"layers.{number}/forward/output") for number in range(3)]
        norm = run.tensor("final_norm/forward/output")
    first = 0 if kind == "mamba" else 1
    for number in range(2):
        assert torch.allclose(found[number], states[number + first], atol=1e-5)
    assert torch.allclose(norm, states[-1], atol=1e-5)
    if kind not in ("gpt2", "mamba"):  # the first hidden state of a GPT-2 has positions in it
        assert torch.equal(_load(folder, "embedding_output"), states[0])
    for number, name in enumerate(OUTPUTS):
        assert torch.equal(_load(folder, name), found[number])
    assert torch.equal(_load(folder, "final_norm_output"), norm)
    for word in ("embedding", "layer 0", "layer 1", "layer 2", "final norm", "the bytes of the"):
        assert word in printed
    assert printed.count("✓") + printed.count("ok ") == 5


def _load(folder: Path, name: str) -> torch.Tensor:
    found = torch.load(folder / "layers-pt" / f"{name}.pt", weights_only=True)
    assert isinstance(found, torch.Tensor)
    return found


def test_the_run_and_the_old_metadata_say_what_was_run(tt, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("NEURON_CC_FLAGS", "--model-type transformer")
    model = checkpoint()
    code, found, _ = tt(
        "neuron", "layers", "--model", model, "--prompt", TEXT, "--dtype", "bf16",
        "--test-type", "extract-all", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0
    folder = tmp_path / "out" / "prompt-0"
    with tensortap.open_run(folder / "run") as run:
        about, config = run.info.metadata, run.info.model_config
        assert run.tensor("layers.1/forward/output").dtype == torch.bfloat16
    assert about["prompt"] == TEXT
    assert about["token_ids"] == the_ids()[0].tolist()
    assert (about["device"], about["dtype"], about["model"]) == ("cpu", "bfloat16", str(model))
    assert about["compiler_flags"]["NEURON_CC_FLAGS"] == "--model-type transformer"
    assert config["num_hidden_layers"] == 3
    old = torch.load(folder / "layers-pt" / "metadata.pt", weights_only=True)
    assert old["prompt"] == TEXT
    assert old["statistics"].keys() >= {"layer_0", "embedding", "final_norm"}
    for said in old["statistics"].values():
        assert (said["has_nan"], said["has_inf"]) == (False, False)
    assert found["prompts"][0]["fine"] is True
    assert [one["file"] for one in found["prompts"][0]["layers"]][:2] == [
        "embedding_output.pt", "layer_0_output.pt",
    ]  # fmt: skip


def test_printed_statistics_are_those_of_the_layer(tt, checkpoint, tmp_path):
    found = tt(
        "neuron", "layers", "--model", checkpoint(), "--prompt", TEXT, "--out", tmp_path / "out",
        "--json",
    )[1]["prompts"][0]  # fmt: skip
    for one in found["layers"]:
        file = Path(found["layers_pt"]) / one["file"]
        values = torch.load(file, weights_only=True).double().numpy()
        assert one["shape"] == list(values.shape)
        assert one["mean"] == pytest.approx(values.mean(), abs=1e-9)
        assert one["std"] == pytest.approx(values.std(), rel=1e-6)
        assert (one["min"], one["max"]) == (values.min(), values.max())


def test_each_prompt_is_a_run_of_its_own_and_replaced_only_when_asked(tt, checkpoint, tmp_path):
    out, model = tmp_path / "out", checkpoint()
    both = ("--prompt", "one", "--prompt", "two!")
    assert tt("neuron", "layers", "--model", model, *both, "--out", out)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["prompt-0", "prompt-1"]
    for number, text in enumerate(("one", "two!")):
        with tensortap.open_run(out / f"prompt-{number}" / "run") as run:
            assert run.info.metadata["prompt"] == text
            assert run.tensor("layers.0/forward/output").shape == (1, len(text), 32)
    code, _, error = tt("neuron", "layers", "--model", model, "--prompt", "three", "--out", out)
    assert code == 2
    assert "prompt-0 exists" in error
    again = ("--prompt", "three", "--overwrite")
    assert tt("neuron", "layers", "--model", model, *again, "--out", out)[0] == 0
    with tensortap.open_run(out / "prompt-0" / "run") as run:
        assert run.info.metadata["prompt"] == "three"


def test_nan_and_an_abnormal_mean_are_crossed_and_make_the_exit_code_1(tt, checkpoint, tmp_path):
    def break_layers(model):
        model.model.layers[1].mlp.down_proj.weight[3, 7] = float("nan")
        model.model.embed_tokens.weight.add_(20)

    model = checkpoint(edit=break_layers)
    code, printed, _ = tt(
        "neuron", "layers", "--model", model, "--prompt", TEXT, "--out", tmp_path / "out"
    )
    assert code == 1
    lines = [line for line in printed.splitlines() if line.startswith(("✗", "BAD", "✓", "ok"))]
    assert "|mean| > 10" in lines[0]
    assert "8 NaN" in lines[2], "a feature of each of the 8 tokens"
    code, found, _ = tt(
        "neuron", "layers", "--model", model, "--prompt", TEXT, "--out", tmp_path / "o", "--json"
    )
    assert code == 1
    nan = [one["nan"] for one in found["prompts"][0]["layers"]]
    assert nan[:3] == [0, 0, 8]
    assert nan[3] == 256, "attention carries it to every feature"


def test_a_tokenizer_beside_the_model_is_used(tt, checkpoint, tmp_path):
    folder = checkpoint()
    words = {"<unk>": 0, "Paris": 1, "is": 2}
    made = Tokenizer(tokenizer_models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)
    code, found, _ = tt(
        "neuron", "layers", "--model", folder, "--prompt", "Paris is Paris", "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert found["prompts"][0]["token_ids"] == [1, 2, 1]
    assert found["prompts"][0]["tokens"] == "tokenizer"


def test_the_environment_of_other_taps_changes_nothing(tt, checkpoint, tmp_path, monkeypatch):
    for name, value in (("ENABLED", "0"), ("STEPS", "5"), ("RANKS", "3"), ("VALUES", "stats")):
        monkeypatch.setenv(f"TENSORTAP_{name}", value)
    model = checkpoint()
    code = tt("neuron", "layers", "--model", model, "--prompt", "a", "--out", tmp_path / "out")[0]
    assert code == 0
    assert (tmp_path / "out" / "prompt-0" / "layers-pt" / "layer_2_output.pt").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "tpu"), "--device tpu: write one of cpu, cuda, xla, neuron"),
        (("--dtype", "fp8"), "--dtype fp8: write auto, or one of fp64"),
        (("--skip-compile",), "--skip-compile needs --compiled DIR"),
        (("--neuron-config", "tp_degree=2"), "--neuron-config needs --compiled DIR"),
        (("--compiled", "c", "--neuron-config", "tp"), "write KEY=VALUE"),
        (("--compiled", "c", "--device", "cpu"), "--compiled runs on Neuron"),
        (("--test-type", "half"), "--test-type half: write one of full, extract-all"),
        (("--prompt", " "), "--prompt is empty"),
        (("--device", "neuron"), "torch-neuronx 2.13.3"),
        (("--compiled", "c"), "pip install neuronx-distributed-inference"),
        (("--model", "none/such"), "hf download none/such"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tt, checkpoint, tmp_path, words, said):
    given = ("--model", checkpoint(), "--prompt", "a", "--out", tmp_path / "out", *words)
    code, printed, error = tt("neuron", "layers", *given)
    assert code == 2
    assert said in error
    assert "Traceback" not in printed + error
    assert not list(tmp_path.glob("out/*"))


def test_an_encoder_is_refused(tt, tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    code, _, error = tt(
        "neuron", "layers", "--model", tmp_path / "t5", "--prompt", "a", "--out", tmp_path / "out"
    )
    assert code == 2
    assert "has an encoder" in error


@pytest.mark.parametrize("module", ["embed_tokens", "norm"])
def test_a_fault_of_the_embedding_or_the_final_norm_is_local(tt, checkpoint, tmp_path, module):
    """What goes into them is captured as well, so that it is known not to differ."""
    right = checkpoint()
    broken = model_of("llama")
    with torch.no_grad():
        getattr(broken.model, module).weight.mul_(1.1)
    broken.save_pretrained(tmp_path / "broken")
    for model, dtype, out in (
        (right, "fp32", "gpu"), (right, "bf16", "noise"), (tmp_path / "broken", "bf16", "port")
    ):  # fmt: skip
        given = ("--model", model, "--prompt", TEXT, "--dtype", dtype, "--out", tmp_path / out)
        assert tt("neuron", "layers", *given)[0] == 0
    code, found, _ = tt(
        "neuron", "compare", "--gpu-path", tmp_path / "gpu", "--neuron-path", tmp_path / "port",
        "--noise", tmp_path / "noise", "--json",
    )  # fmt: skip
    assert code == 1
    [told] = found["prompts"]
    name = {"embed_tokens": "embed/forward/output", "norm": "final_norm/forward/output"}[module]
    assert told["first_divergence"] == told["first_local_divergence"] == name
    assert len(told["layers"]) == 5
    assert told["missing"] == []


def test_a_forward_that_fails_is_one_line_and_leaves_nothing(tt, tmp_path, monkeypatch):
    model_of("gpt2").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, ids: ids.no_such_word)
    code, printed, error = tt(
        "neuron",
        "layers",
        "--model",
        tmp_path / "model",
        "--prompt",
        "a",
        "--out",
        tmp_path / "out",
    )
    assert code == 2
    assert "The forward of GPT2LMHeadModel fails on cpu: AttributeError" in error
    assert "Traceback" not in printed + error
    assert not list(tmp_path.glob("out/*")) + list(tmp_path.glob("out/.*"))


def test_a_prompt_longer_than_the_model_has_room_for_is_refused(tt, tmp_path):
    """A lazy device reads past the table of positions without a word."""
    model_of("gpt2", n_positions=4).save_pretrained(tmp_path / "short")
    code, _, error = tt(
        "neuron", "layers", "--model", tmp_path / "short", "--prompt", "too long for it",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert "has 15 tokens, and the model room for 4" in error


def test_the_vision_tower_beside_a_decoder_is_left_out():
    text = transformers.LlamaConfig(**KINDS["llama"][1])
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=16,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=255)
    )
    assert [place.title for place in places_of(model)] == [
        "embedding", "layer 0", "layer 1", "layer 2", "final norm",
    ]  # fmt: skip


def test_a_capture_that_stops_half_way_is_told_and_makes_the_exit_code_1(
    tt, checkpoint, tmp_path, monkeypatch
):
    original = calling.forward

    def without_the_last_layer(model, ids):
        model.model.config.num_hidden_layers = 2
        original(model, ids)

    monkeypatch.setattr(capturing, "forward", without_the_last_layer)
    code, printed, _ = tt(
        "neuron", "layers", "--model", checkpoint(), "--prompt", TEXT, "--out", tmp_path / "out"
    )
    assert code == 1
    assert "layer 2: a container without a call of its own" in printed
    assert not (tmp_path / "out" / "prompt-0" / "layers-pt" / "layer_2_output.pt").exists()


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_loaded(
    tt, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    code, _, error = tt(
        "neuron", "layers", "--model", tmp_path, "--prompt", "a", "--out", tmp_path / "file" / "out"
    )
    assert code == 2
    assert f"nothing can be written to {tmp_path / 'file'}" in error
