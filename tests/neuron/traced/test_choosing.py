"""A selection of tensortap names becomes what NxD and NxDI are asked to hand out."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tests.neuron.traced import fake_nxd, fake_nxdi
from tests.neuron.traced.fake_llama import FakeNeuronLlama, huggingface, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tensortap.errors import ConfigError, NotSupported, SelectionError
from tensortap_hf.integration import integration as hf
from tensortap_neuron import traced
from tensortap_neuron.traced.naming import module_name, names_of

CONFIG = SimpleNamespace(num_hidden_layers=2, model_type="llama")
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 2}
TINY |= {"moe_intermediate_size": 16, "num_local_experts": 2, "pad_token_id": 0}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_every_path_has_the_name_that_the_hugging_face_model_gives_it(family):
    config = AutoConfig.for_model(family, **TINY)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    named = {
        site.native.removeprefix("model."): site.name
        for site in hf.sites(model)
        if site.kind == "module"
    }
    paths = [path for path in named if path not in ("", "model", "rotary_emb")]
    assert len(paths) > 15
    assert {path: module_name(path) for path in paths} == {path: named[path] for path in paths}


def test_nxdis_own_layers_around_projections_leave_the_projections_their_names():
    neuron = SimpleNamespace(
        sequence_parallel_enabled=False,
        qkv_kernel_fuse_residual_add=False,
        on_device_sampling_config=1,
    )
    model = FakeNeuronLlama(tiny_config(num_hidden_layers=1), neuron)
    names = names_of(path for path, _ in model.named_modules() if path)
    at = "layers.0.self_attn"
    assert names[f"{at}.qkv_proj.q_proj"] == "layers.0.attn.q"
    assert names[f"{at}.o_proj.o_proj"] == "layers.0.attn.out"
    assert names[f"{at}.o_proj"] == "layers.0.attn.o_proj"
    assert names["layers.0.mlp.down_proj"] == "layers.0.mlp.down"
    assert len(set(names.values())) == len(names)


def test_by_default_every_layer_the_embedding_the_final_norm_and_the_head_are_captured():
    capture = traced.prepare(CONFIG)
    assert capture.nxdi_options() == {
        "modules_to_capture": ["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"],
        "max_intermediate_tensors": None,
        "auto_capture_moe_tensors": False,
        "capture_inputs": False,
    }
    assert list(capture.names.values()) == [
        "embed",
        "layers.0",
        "layers.1",
        "final_norm",
        "lm_head",
    ]


def test_globs_choose_modules_and_inputs():
    capture = traced.prepare(CONFIG, "layers.*.mlp/forward/input,final_norm")
    assert capture.modules == ("layers.0.mlp", "layers.1.mlp", "norm")
    assert capture.nxd_options() == {
        "modules_to_capture": ["layers.0.mlp", "layers.1.mlp", "norm"],
        "max_tensors": None,
        "capture_inputs": True,
    }


def test_of_attention_nxdi_has_the_input_and_the_output_of_its_projection():
    capture = traced.prepare(CONFIG, "layers.0.*/forward/output,!layers.0.*norm/*")
    assert list(capture.names.values()) == ["layers.0.attn.out", "layers.0.mlp"]
    assert capture.modules[0] == "layers.0.self_attn.o_proj"
    assert traced.prepare(CONFIG, "layers.0.attn/forward/input").modules == ("layers.0.self_attn",)
    for options in ({}, {"modules": ["layers.0.self_attn"]}):
        with pytest.raises(SelectionError, match=r"hands out cos_cache.*that of attn\.out"):
            traced.prepare(CONFIG, "layers.*.attn/forward/output", **options)


def test_an_attention_of_two_kinds_has_no_projection_that_its_configuration_could_name():
    """With context parallelism it has `cte_o_proj` and `tkg_o_proj`."""
    neuron = fake_nxdi.NeuronConfig(on_device_sampling_config=object(), cp_degree=2)
    config = SimpleNamespace(**vars(CONFIG), neuron_config=neuron)
    with pytest.raises(SelectionError, match="give modules="):
        traced.prepare(config, "layers.*.attn.out/forward/output")


def test_the_example_of_prepare_selects_the_layers_and_nothing_in_them():
    example = "layers.*/forward/output,!layers.*.*/*"
    assert example in traced.prepare.__doc__
    assert traced.prepare(CONFIG, example).modules == ("layers.0", "layers.1")


def test_the_modules_of_a_live_model_are_those_nxd_lists(monkeypatch):
    fake_nxd.install(monkeypatch)
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"self_attn": nn.Linear(2, 2)})])}
    )
    assert fake_nxd.get_available_modules(model).count("layers.0.self_attn") == 2
    capture = traced.prepare(model, "layers.*.attn")
    assert capture.modules == ("layers.0.self_attn",)
    assert capture.facts.layers == 1


def test_the_lists_of_nxdi_by_submodel_are_taken_as_they_are():
    lists = {"context_encoding_model": ["layers", "layers.0", "layers.0.router"],
             "token_generation_model": ["layers", "layers.0", "layers.0.fused"]}  # fmt: skip
    capture = traced.prepare(CONFIG, "layers.0.*", modules=lists)
    assert capture.modules == ("layers.0", "layers.0.router", "layers.0.fused")


def test_paths_of_a_hugging_face_model_are_those_of_nxdi_without_model_in_front():
    capture = traced.prepare(huggingface(), "layers.1/forward/output,embed/forward/output")
    assert capture.nxd_options()["modules_to_capture"] == ["model.embed_tokens", "model.layers.1"]
    assert capture.nxdi_options()["modules_to_capture"] == ["embed_tokens", "layers.1"]


def test_a_checkpoint_folder_does(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert traced.prepare(tmp_path).modules == traced.prepare(huggingface().config).modules


def test_a_multimodal_configuration_is_that_of_its_language_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 3}}))
    assert "layers.2" in traced.prepare(tmp_path).modules


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("layers.*.output", "An output is written layers.*/forward/output"),
        ("layers.*.self_attn/forward/output", "'self_attn' is called 'attn' here"),
        ("norm/forward/output", "'norm' is called 'final_norm' here"),
        ("layers.2/forward/output", "layers.1/forward/output"),
        ("embed,layers.*.attn.q", "give modules="),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_matches(select, said):
    with pytest.raises(SelectionError, match="nothing that can be captured") as raised:
        traced.prepare(CONFIG, select)
    assert said in str(raised.value)


def test_an_exclusion_that_matches_nothing_is_none():
    assert traced.prepare(CONFIG, "embed,!layers.9").modules == ("embed_tokens",)


def test_a_capture_of_nothing_is_an_error():
    with pytest.raises(SelectionError, match="matches nothing in this model"):
        traced.prepare(CONFIG, "embed/forward/output,!embed")


def test_only_what_is_registered_by_hand_can_be_captured():
    assert traced.prepare(CONFIG, "a/forward/x", manual=["a/forward/x"]).modules == ()
    index = "layers.*.mlp.router/forward/expert_index"
    assert traced.prepare(CONFIG, index, moe=True).nxdi_options() == {
        "modules_to_capture": [],
        "max_intermediate_tensors": 1,
        "auto_capture_moe_tensors": True,
        "capture_inputs": False,
    }


def test_tensors_registered_by_hand_have_room_and_names():
    capture = traced.prepare(CONFIG, "embed", manual=["layers.0.attn.core/forward/probs"])
    assert capture.nxdi_options()["max_intermediate_tensors"] == 1
    with pytest.raises(ConfigError, match="not a tensor name"):
        traced.prepare(CONFIG, "embed", manual=["probs"])
    with pytest.raises(ConfigError, match="forward tensors only"):
        traced.prepare(CONFIG, "embed", manual=["embed/grad/weight"])


def test_the_experts_of_every_layer_have_room(monkeypatch):
    """NxD counts each layer's indices towards the room before it stacks them."""
    fake_nxd.install(monkeypatch)
    capture = traced.prepare(CONFIG, "embed", manual=["embed/forward/x"], moe=True)
    config = fake_nxdi.TensorCaptureConfig(**capture.nxdi_options())
    assert config.max_intermediate_tensors == capture.max_tensors == 3
    registry = fake_nxd.TensorRegistry.get_instance()
    registry.configure(True, [], config.max_intermediate_tensors)
    for name in ("x", "moe_auto_0", "moe_auto_1"):
        registry.register_tensor(name, torch.zeros(4, 2))
    assert registry.get_manual_tensors()["auto_moe_stats.expert_index"].shape == (2, 4, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output_logits": True}, "on_device_sampling_config"),
        ({"enable_fused_speculation": True}, "enable_fused_speculation"),
        ({"is_medusa": True}, "is_medusa"),
        ({"async_mode": True}, "async_mode"),
        ({"windowed_context_encoding_size": 4}, "the last one only"),
    ],
)
def test_a_configuration_under_which_captures_are_dropped_or_wrong_is_refused(options, said):
    sampling = {} if "output_logits" in options else {"on_device_sampling_config": object()}
    neuron = fake_nxdi.NeuronConfig(**options, **sampling)
    config = SimpleNamespace(num_hidden_layers=2, model_type="llama", neuron_config=neuron)
    with pytest.raises(NotSupported, match=said):
        traced.prepare(config)


def test_logits_that_nxd_cannot_hand_out_are_not_asked_for():
    """Its registry cuts the padding of all ranks off the piece of one."""
    neuron = fake_nxdi.NeuronConfig(on_device_sampling_config=object(), tp_degree=7)
    config = SimpleNamespace(**vars(CONFIG), neuron_config=neuron, vocab_size=60)
    assert "lm_head" not in traced.prepare(config).modules
    with pytest.raises(SelectionError, match="vocabulary that tp_degree does not divide"):
        traced.prepare(config, "lm_head/forward/output")
    head = fake_nxd.ColumnParallelLinear(
        8, 60, gather_output=False, pad=True, group=fake_nxd.FakeGroup(7)
    )
    registry = fake_nxd.TensorRegistry()
    registry.configure(True, ["lm_head"])
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        registry.register_tensor("lm_head.outputs", torch.rand(1, 1, 9), head)
    config.vocab_size = 63
    assert "lm_head" in traced.prepare(config).modules


@pytest.mark.parametrize("manual", [["layers.0/forward/output"], ["a/forward/x", "a/forward/x"]])
def test_a_name_by_hand_that_is_another_tensors_is_refused(manual):
    with pytest.raises(ConfigError, match="is the name of another tensor"):
        traced.prepare(CONFIG, "layers.0/forward/output", manual=manual)


def test_what_is_no_list_of_paths_is_said():
    with pytest.raises(ConfigError, match="paths of modules as text"):
        traced.prepare(CONFIG, "*", modules=[1])


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        traced.prepare(object())
    with pytest.raises(ConfigError, match=r"config\.json"):
        traced.prepare(tmp_path)
