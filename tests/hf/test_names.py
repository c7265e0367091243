"""Canonical names: equal words for equal things in every family."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tensortap.names import PHASES, TensorName
from tensortap_hf.integration import integration

LLAMA = (
    "attn attn.core attn.q attn.k attn.v attn.out mlp mlp.gate mlp.up mlp.down mlp.act "
    "input_norm post_attn_norm"
)
# What a layer holds, next to itself. Dropout and other modules without a canonical word are
# named by their own word below the nearest canonical one.
LAYERS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA + " attn.q_norm attn.k_norm",
    "gemma": LLAMA,
    "gemma2": LLAMA + " pre_mlp_norm post_mlp_norm",
    "gemma3": LLAMA + " attn.q_norm attn.k_norm pre_mlp_norm post_mlp_norm",
    "gpt2": "attn attn.core attn.qkv attn.out attn.attn_dropout attn.resid_dropout "
    "mlp mlp.up mlp.down mlp.act mlp.dropout input_norm post_attn_norm",
    "gpt_neox": "attn attn.core attn.qkv attn.out mlp mlp.up mlp.down mlp.act "
    "input_norm post_attn_norm post_attention_dropout post_mlp_dropout",
    "opt": "attn attn.core attn.q attn.k attn.v attn.out mlp.up mlp.act mlp.down "
    "input_norm post_attn_norm",
    "phi": "attn attn.core attn.q attn.k attn.v attn.out mlp mlp.up mlp.act mlp.down "
    "input_norm resid_dropout",
    "phi3": "attn attn.core attn.qkv attn.out mlp mlp.gate_up mlp.act mlp.down "
    "input_norm post_attn_norm resid_attn_dropout resid_mlp_dropout",
    "mixtral": "attn attn.core attn.q attn.k attn.v attn.out mlp mlp.router mlp.experts "
    "mlp.experts.act input_norm post_attn_norm",
    "bert": "attn attn.core attn.self attn.self.dropout attn.q attn.k attn.v attn.output "
    "attn.out attn.output.dropout post_attn_norm intermediate mlp.up mlp.act output mlp.down "
    "post_mlp_norm output.dropout",
    "mamba": "norm mixer mixer.in_proj mixer.conv mixer.conv1d mixer.act mixer.x_proj "
    "mixer.dt_proj mixer.scan mixer.out_proj",
    "mamba2": "norm mixer mixer.in_proj mixer.conv mixer.conv1d mixer.act mixer.norm mixer.scan "
    "mixer.out_proj",
}


OTHERS = (
    "cohere",
    "deepseek_v3",
    "ernie4_5",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "gptj",
    "granite",
    "helium",
    "llama4_text",
    "mpt",
    "olmo2",
    "olmoe",
    "persimmon",
    "qwen2_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""Families without a word about them in the rules."""


def names(model: nn.Module) -> list[str]:
    return [site.name for site in integration.sites(model)]


def test_a_layer_holds_the_canonical_words_of_its_family(family: str, build: Any) -> None:
    found = {name for name in names(build(family)) if name.startswith("layers.1.")}
    assert found == {f"layers.1.{word}" for word in LAYERS[family].split()}


def test_outside_of_the_layers_every_family_has_the_same_words(family: str, build: Any) -> None:
    expected = {"root", "embed", "layers", "layers.0", "layers.1", "lm_head"}
    expected |= {"final_norm"} if family != "bert" else {"embed.norm", "embed.position"}
    assert expected <= set(names(build(family)))


@pytest.mark.parametrize("other", OTHERS)
def test_a_family_that_uses_known_words_needs_no_rule(other: str) -> None:
    config = transformers.CONFIG_MAPPING[other]()
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        found = set(names(transformers.AutoModelForCausalLM.from_config(config)))
    assert {"embed", "layers.0.attn.out", "layers.1.mlp", "final_norm", "lm_head"} <= found
    assert {f"layers.0.attn.{word}" for word in ("q", "k", "v")} <= found or not found.isdisjoint(
        {"layers.0.attn.qkv", "layers.0.attn.kv_a_proj_with_mqa"}
    )
    assert not any(name.startswith(("model.layers", "transformer.h.")) for name in found)


def test_names_are_unique_and_can_be_parsed(any_family: str, build: Any) -> None:
    found = names(build(any_family))
    assert len(set(found)) == len(found)
    for name in found:
        for phase in PHASES:
            assert TensorName.parse(f"{name}/{phase}/output").module == name


def test_every_module_has_a_site_in_the_order_of_named_modules(family: str, build: Any) -> None:
    model = build(family)
    sites = integration.sites(model)
    modules = [(site.native, site.module) for site in sites if site.kind == "module"]
    assert modules == list(model.named_modules())


def test_a_function_site_follows_the_module_it_belongs_to(family: str, build: Any) -> None:
    sites = integration.sites(build(family))
    for before, site in itertools.pairwise(sites):
        if site.kind == "function":
            assert before.module is site.module


def test_a_module_without_a_canonical_word_keeps_its_native_path(build: Any) -> None:
    model = build("llama")
    model.model.layers[0].self_attn.probe_head = nn.Linear(2, 2)
    model.model.extra = nn.Identity()
    found = names(model)
    assert {"model", "model.rotary_emb", "model.extra", "layers.0.attn.probe_head"} <= set(found)


def test_two_modules_of_one_meaning_keep_two_names(build: Any) -> None:
    model = build("llama")
    layer = model.model.layers[0]
    layer.attention = nn.Identity()  # `attention` and `self_attn` both mean `attn`.
    model.get_submodule("model").add_module("embed", nn.Identity())
    found = {site.native: site.name for site in integration.sites(model)}
    assert found["model.layers.0.self_attn"] == "layers.0.attn"
    assert found["model.layers.0.attention"] == "model.layers.0.attention"
    assert found["model.embed"] == "model.embed"


def test_both_towers_of_an_encoder_decoder_are_told_apart(build: Any) -> None:
    found = set(names(build("t5")))
    assert {"embed", "encoder.layers.0.attn.q", "encoder.final_norm", "lm_head"} <= found
    assert {"decoder.layers.1.cross_attn.core", "decoder.layers.1.mlp.up"} <= found


def test_a_vision_tower_does_not_change_the_names_of_the_language_model() -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28}
    config = transformers.Gemma3Config(
        text_config={**text, **heads}, vision_config={**vision, "num_attention_heads": 4}
    )
    found = set(names(transformers.Gemma3ForConditionalGeneration(config)))
    assert {"embed", "layers.0.attn.q", "layers.0.mlp.down", "final_norm", "lm_head"} <= found
    assert any(name.endswith("layers.0.attn.q") and "vision" in name for name in found)


def test_a_post_norm_opt_names_its_norms_by_what_they_follow(build: Any) -> None:
    def norms(model: nn.Module) -> dict[str, str]:
        sites = integration.sites(model)
        return {s.native.rpartition(".")[2]: s.name for s in sites if "layers.0." in s.name}

    after = norms(build("opt", do_layer_norm_before=False))
    assert after["self_attn_layer_norm"] == "layers.0.post_attn_norm"
    assert after["final_layer_norm"] == "layers.0.post_mlp_norm"
    assert norms(build("opt"))["self_attn_layer_norm"] == "layers.0.input_norm"


def checkpointed_layers(model: Any) -> Any:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer)
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, checkpointed_layers])
def test_wrappers_do_not_change_names(wrap: Any, build: Any) -> None:
    plain = names(build("llama"))
    assert names(wrap(build("llama"))) == plain


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_an_adapted_model_has_the_names_of_the_plain_one(build: Any) -> None:
    import peft

    plain = names(build("llama"))
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    adapted = names(peft.get_peft_model(build("llama"), config))
    assert set(plain) <= set(adapted)
    assert "layers.0.attn.q.base_layer" in adapted
    assert not any(name.startswith("base_model") for name in adapted)


def test_a_model_inside_of_another_module_is_named_all_the_same(build: Any) -> None:
    class Reward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = build("llama")
            self.head = nn.Linear(32, 1)

    found = set(names(Reward()))
    assert {"root", "layers.0.attn.q", "layers.1.mlp.down", "head"} <= found


def test_a_bare_transformers_module_without_a_model_is_refused() -> None:
    from transformers.pytorch_utils import Conv1D

    reason = integration.refuse(nn.Sequential(Conv1D(4, 4)))
    assert reason == "Sequential holds no transformers PreTrainedModel."


def test_an_older_transformers_is_refused_with_both_versions(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    fake = SimpleNamespace(__version__="4.30.0")
    monkeypatch.setitem(sys.modules, "transformers", fake)
    reason = integration.refuse(model)
    assert reason is not None
    assert "4.30.0" in reason
    assert "5.20 or newer" in reason
