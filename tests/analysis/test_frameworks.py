"""The same weights in Hugging Face's Llama and in a Megatron GPTModel, compared by the command."""

from __future__ import annotations

import json
from contextlib import ExitStack, nullcontext

import pytest
import torch
import torch.nn.functional as F
from examples.train_llama.hf_weights import load_hf_llama

import tensortap

pytest.importorskip("megatron.core")
transformers = pytest.importorskip("transformers")

from tests.megatron import quantize_layers as built  # noqa: E402

from tensortap_megatron.quantization import quantize  # noqa: E402

pytestmark = pytest.mark.xdist_group("frameworks")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.2,
        attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def capture_llama(model, path):
    tokens = built.batch()
    with tensortap.attach(model, path, values="full", on_error="raise"):
        logits = model(input_ids=tokens["input_ids"]).logits
        F.cross_entropy(logits.flatten(0, 1), tokens["labels"].flatten()).backward()
    return path


def capture_megatron(weights, path, *, perturb=None, format=None):
    """The same step of a GPTModel with these weights, one of them a few per cent off."""
    model = built.gpt(num_layers=4, layernorm_epsilon=1e-5)
    load_hf_llama(model, weights)
    if perturb is not None:
        weight = dict(model.named_parameters())[perturb]
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        weight.data += 0.05 * weight.data.std() * noise
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if format is None else quantize(model, format))
        stack.enter_context(tensortap.attach(model, path, values="full", on_error="raise"))
        model(**built.batch()).mean().backward()
    return path


@pytest.fixture(scope="module")
def runs(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frameworks")
    capture_llama(llama, folder / "hf")
    weights = llama.state_dict()
    wrong = "decoder.layers.2.mlp.linear_fc2.weight"
    with built.ranks():
        capture_megatron(weights, folder / "megatron")
        capture_megatron(weights, folder / "perturbed", perturb=wrong)
        capture_megatron(weights, folder / "mxfp4", format="mxfp4")
        capture_megatron(weights, folder / "both", perturb=wrong, format="mxfp4")
    return folder


def compared(cli, *arguments):
    """The only run of a comparison, as the command prints it."""
    _, out, _ = cli("compare", *arguments, "--json")
    return json.loads(out)["runs"][0]


def local(found):
    return [one["tensor"] for one in found["divergences"] if one["origin"] == "local"]


def test_the_same_weights_in_both_frameworks_agree(cli, runs):
    given = runs / "hf", runs / "megatron"
    code, out, _ = cli("compare", *given, "--json")
    [run] = json.loads(out)["runs"]
    assert (code, run["verdict"], run["divergences"]) == (0, "agree", [])
    names = {row["tensor"] for row in run["tensors"]}
    for layer in range(4):
        for word in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down"):
            for rest in ("forward/output", "backward/grad_output", "param/weight", "grad/weight"):
                assert f"layers.{layer}.{word}/{rest}" in names
    assert all(row["by"] == "values" for row in run["tensors"])


def test_a_weight_that_was_converted_wrongly_is_named(cli, runs):
    code, out, _ = cli("compare", runs / "hf", runs / "perturbed", "--json")
    [run] = json.loads(out)["runs"]
    assert (code, run["verdict"]) == (1, "differ")
    assert run["first_divergence"]["tensor"] == "layers.2.mlp.down/param/weight"
    assert run["first_divergence"]["error"] == pytest.approx(0.05, rel=0.1)
    assert {name.split("/")[0] for name in local(run)} == {"layers.2.mlp.down"}
    inherited = {one["tensor"] for one in run["divergences"]} - set(local(run))
    assert "layers.3/forward/output" in inherited
    assert not any(name.startswith(("layers.0", "layers.1")) and "/forward/" in name
                   for name in inherited)  # fmt: skip


def test_a_quantised_megatron_parts_at_its_first_products_and_errs_anew_in_every_linear(cli, runs):
    run = compared(cli, runs / "hf", runs / "mxfp4")
    first = {f"layers.0.attn.{word}/forward/output" for word in "qkv"}
    assert run["first_divergence"]["tensor"] in first
    linears = {
        f"layers.{layer}.{word}/forward/output"
        for layer in range(4)
        for word in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert first <= set(local(run)) <= linears


def test_a_wrong_weight_is_told_from_the_noise_of_quantising(cli, runs):
    run = compared(cli, runs / "megatron", runs / "both", "--noise", runs / "mxfp4")
    assert [one["tensor"] for one in run["divergences"]] == ["layers.2.mlp.down/param/weight"]
    assert run["first_divergence"]["origin"] == "local"
    across = compared(cli, runs / "hf", runs / "both", "--noise", runs / "mxfp4")
    assert [one["tensor"] for one in across["divergences"]] == ["layers.2.mlp.down/param/weight"]
