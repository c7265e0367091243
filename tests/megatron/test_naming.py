"""Names of all kinds of Megatron-core models, and what attaching leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.megatron import fake_transformer_engine as fake
from tests.megatron import quantize_layers as built
from torch import nn

import tensortap
from tensortap import MemorySink
from tensortap.errors import NotSupported
from tensortap.names import PHASES, TensorName
from tensortap.records import Placement
from tensortap_megatron import activations, parameters
from tensortap_megatron.facts import Facts
from tensortap_megatron.integration import integration
from tensortap_megatron.naming import Named, modules
from tensortap_megatron.parallel import Group, Parallel

pytestmark = pytest.mark.xdist_group("megatron-naming")


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


def names(model: nn.Module) -> dict[str, str]:
    """Native path -> canonical name; each name once, and each of them can be parsed."""
    found = modules(model)
    assert len({named.name for named in found}) == len(found)
    for named in found:
        for phase in PHASES:
            TensorName.parse(f"{named.name}/{phase}/output")
    return {named.native: named.name for named in found}


def captured(model: nn.Module, **inputs: Any) -> MemorySink:
    """What a tap sees of one forward and backward."""
    sink = MemorySink()
    with tensortap.attach(model, sink, values="full", on_error="raise"):
        output = model(**(inputs or built.batch()))
        (output[0] if isinstance(output, tuple) else output).float().sum().backward()
    return sink


def latent() -> Any:
    """Multi-latent attention: it needs Transformer Engine's attention, of unequal widths."""
    from examples.train_llama.cpu import CPU_CONFIG
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(
        **CPU_CONFIG,
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_head_dim=16,
        qk_pos_emb_head_dim=8,
        v_head_dim=24,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec(
        multi_latent_attention=True, normalization="RMSNorm", qk_layernorm=True
    )
    spec.submodules.self_attention.submodules.core_attention = fake.TEDotProductAttention
    with pytest.MonkeyPatch.context() as patch:
        # Without Transformer Engine Megatron asks whether a layer is an instance of `None`.
        patch.setattr(multi_latent_attention, "TELinear", fake.TELinear)
        return GPTModel(
            config, spec, vocab_size=256, max_sequence_length=64, position_embedding_type="none"
        )


def test_multi_latent_attention_has_names_for_what_others_have_and_native_ones_for_the_rest() -> (
    None
):
    model = latent()
    found = names(model)
    below = {
        native.rpartition(".")[2]: name.removeprefix("layers.0.attn.")
        for native, name in found.items()
        if "self_attention." in native
    }
    assert below == {
        "core_attention": "core",
        "linear_proj": "out",
        "linear_q_down_proj": "linear_q_down_proj",
        "linear_q_up_proj": "linear_q_up_proj",
        "linear_kv_down_proj": "linear_kv_down_proj",
        "linear_kv_up_proj": "linear_kv_up_proj",
        "q_layernorm": "q_norm",
        "kv_layernorm": "kv_norm",
        "rotary_pos_emb": "rotary_pos_emb",
    }
    sink = captured(model)
    [(record, key)] = sink.find("layers.0.attn.core/forward/key")
    assert (record.dims, key.shape) == ("seq batch head dim", (40, 2, 4, 24))
    [(_, value)] = sink.find("layers.0.attn.core/backward/grad_value")
    assert value.shape == (40, 2, 4, 24)


def test_norms_fused_into_multi_latent_projections_do_not_pass_for_the_layers_norm() -> None:
    model = latent()
    attention = model.decoder.layers[0].self_attention
    engine = {
        word: fake.TELayerNormColumnParallelLinear(
            16, 4 * width, config=model.config, bias=False, skip_bias_add=False, is_expert=False
        )
        for word, width in (("linear_q_up_proj", 24), ("linear_kv_up_proj", 40))
    }
    for word, layer in engine.items():
        nn.init.normal_(layer.weight)
        setattr(attention, word, layer)
    attention.q_layernorm = attention.kv_layernorm = nn.Identity()
    sites = [(site.name, site.native) for site in integration.sites(model)]
    assert len(sites) == len(set(sites))
    sink = captured(model)
    for word in ("q", "kv"):
        weight = engine[f"linear_{word}_up_proj"].layer_norm_weight
        [(_, found)] = sink.find(f"layers.0.attn.{word}_norm/param/weight")
        assert torch.equal(found, weight)
    assert len(sink.find("layers.0.input_norm/param/weight")) == 1
    assert len(sink.find("layers.0.attn/forward/input")) == 1  # Its norm is a module of its own.


def test_norms_of_queries_and_keys_have_names() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=True)
    config = built.config(num_layers=1, qk_layernorm=True)
    model = GPTModel(
        config, spec, vocab_size=256, max_sequence_length=64, position_embedding_type="rope"
    )
    sink = captured(model)
    for word, heads in (("q", 4), ("k", 2)):
        [(record, tensor)] = sink.find(f"layers.0.attn.{word}_norm/forward/output")
        assert (record.dims, tensor.shape) == ("seq batch head dim", (40, 2, heads, 16))


def test_experts_have_numbers_and_shared_ones_a_name() -> None:
    model = built.gpt(
        num_layers=1,
        num_moe_experts=4,
        moe_ffn_hidden_size=96,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_shared_expert_intermediate_size=32,
    )
    found = names(model)
    mlp = "decoder.layers.0.mlp"
    assert found[f"{mlp}.router"] == "layers.0.mlp.router"
    assert found[f"{mlp}.experts.local_experts.2.linear_fc2"] == "layers.0.mlp.experts.2.down"
    assert found[f"{mlp}.shared_experts.linear_fc1"] == "layers.0.mlp.shared_expert.gate_up"
    sink = captured(model)
    [(record, weight)] = sink.find("layers.0.mlp.shared_expert.gate_up/param/weight")
    parts = {part.module: part.segments for part in record.placement.parts}
    assert weight.shape == (64, 64)
    assert parts == {
        "layers.0.mlp.shared_expert.gate": ((0, 32),),
        "layers.0.mlp.shared_expert.up": ((32, 32),),
    }


def spread(config: Any) -> Facts:
    """The second of two tensor-parallel ranks."""
    return Facts(config, Parallel({"tp": Group(2, 1)}), None, True, True, False)


def test_shared_experts_that_overlap_communication_are_not_placed_as_if_they_did_it() -> None:
    def plans(*, overlap: bool) -> set[str]:
        model = built.gpt(
            num_layers=1,
            num_moe_experts=4,
            moe_ffn_hidden_size=96,
            moe_token_dispatcher_type="alltoall",
            moe_shared_expert_intermediate_size=32,
            moe_shared_expert_overlap=overlap,
        )
        [down] = [n for n in modules(model) if n.name == "layers.0.mlp.shared_expert.down"]
        return set(activations.plans(down, spread(model.config)))

    assert plans(overlap=True) == {"weight"}
    assert {"input", "weight", "output"} <= plans(overlap=False)


def test_a_gated_projection_is_two_halves_per_rank_under_its_native_path_too() -> None:
    """That of multi-token prediction keeps its path; a rank still holds a piece of each half."""
    layer = built.gpt(num_layers=1).decoder.layers[0].mlp.linear_fc1
    named = Named("mtp.layers.0.mlp.linear_fc1", "mtp.layers.0.mlp.linear_fc1", layer)
    placed = parameters.plans(named, spread(layer.config))["weight"].place(
        layer.weight, gradient=False
    )
    assert placed is not None
    half = layer.weight.shape[0]  # Of two ranks together.
    assert placed.segments == {0: ((half // 2, half // 2), (half + half // 2, half // 2))}


def test_a_split_parameter_that_no_rule_knows_is_unknown_not_whole() -> None:
    module = nn.Module()
    module.strange = nn.Parameter(torch.zeros(4))
    module.strange.tensor_model_parallel = True
    plan = parameters.plans(Named("odd", "odd", module), spread(None))["strange"]
    assert plan.place(module.strange, gradient=False) == Placement(unknown=True)


def test_multi_token_prediction_keeps_its_native_paths() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = built.config(num_layers=1, mtp_num_layers=1, mtp_loss_scaling_factor=0.1)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config,
        spec,
        vocab_size=256,
        max_sequence_length=64,
        position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )
    found = names(model)
    inside = {native: name for native, name in found.items() if native.startswith("mtp")}
    assert len(inside) > 10
    assert all(native == name for native, name in inside.items())
    assert found["decoder.layers.0.mlp.linear_fc1"] == "layers.0.mlp.gate_up"
    [(record, _)] = captured(model).find("lm_head/forward/output")[:1]
    assert record.dims == "seq batch vocab"


def test_a_model_in_megatrons_wrappers_has_the_names_of_the_model() -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    bare = built.gpt(num_layers=1, bf16=True, params_dtype=torch.bfloat16)
    plain = names(bare)
    wrapped = DistributedDataParallel(
        bare.config, DistributedDataParallelConfig(), Float16Module(bare.config, bare)
    )
    found = names(wrapped)
    assert list(found.values()) == list(plain.values())
    assert integration.refuse(wrapped) is None
    sink = captured(wrapped)
    [(record, _)] = sink.find("layers.0.attn.qkv/forward/input")
    assert record.dtype == "bfloat16"


def test_a_block_and_a_layer_by_themselves_have_the_names_they_have_in_the_model() -> None:
    model = built.gpt()
    whole = names(model)
    hidden = {
        "hidden_states": torch.randn(8, 2, 64, requires_grad=True),
        "attention_mask": torch.ones(1, 1, 8, 8).triu(1).bool(),
    }
    for path in ("decoder", "decoder.layers.1"):
        part = model.get_submodule(path)
        for native, name in names(part).items():
            assert name == (whole[f"{path}.{native}"] if native else "root")
        sink = captured(part, **hidden)
        for tensor in ("root/forward/input", "root/forward/output", "layers.1.attn/forward/input"):
            [(record, value)] = sink.find(tensor)
            assert (record.dims, value.shape) == ("seq batch hidden", (8, 2, 64))


def test_logits_are_whole_where_no_loss_is_computed() -> None:
    model = built.gpt(num_layers=1)
    batch = built.batch()
    del batch["labels"]
    [(record, logits)] = captured(model, **batch).find("root/forward/output")
    assert logits.shape == (2, 40, 256)
    assert record.placement is None
    assert record.dims is None  # With labels it is [batch, seq].


def test_two_towers_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = built.config(num_layers=1, num_query_groups=4)
    # Before 0.16 these ask for Transformer Engine's norm even without it.
    monkeypatch.setattr(t5_spec, "TENorm", WrappedTorchNorm, raising=False)
    encoder = t5_spec.get_t5_encoder_with_local_block_spec(1)
    decoder = t5_spec.get_t5_decoder_with_local_block_spec(1)
    encoder.layer_norm = decoder.layer_norm = WrappedTorchNorm
    model = T5Model(config, config, encoder, decoder, vocab_size=256, max_sequence_length=64)
    found = names(model)
    assert found["encoder.layers.0.self_attention.linear_qkv"] == "encoder.layers.0.attn.qkv"
    assert found["decoder.layers.0.self_attention.linear_qkv"] == "decoder.layers.0.attn.qkv"
    assert found["decoder.layers.0.cross_attention.linear_q"] == "decoder.layers.0.cross_attn.q"
    assert found["encoder.final_layernorm"] == "encoder.final_norm"
    assert found["decoder.final_layernorm"] == "decoder.final_norm"
    assert found["embedding.word_embeddings"] == "embed"


def test_an_encoder_alone_has_the_plain_names() -> None:
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    config = built.config(num_layers=1, num_query_groups=4, normalization="LayerNorm")
    model = BertModel(config, 0, bert_layer_local_spec, vocab_size=256, max_sequence_length=64)
    found = names(model)
    assert found["encoder.layers.0.mlp.linear_fc2"] == "layers.0.mlp.down"
    assert found["encoder.final_layernorm"] == "final_norm"
    assert found["embedding.word_embeddings"] == "embed"


def test_a_copy_of_a_tapped_model_is_not_tapped() -> None:
    model, sink = built.gpt(num_layers=1), MemorySink()
    # Process groups cannot be copied; whoever copies a Megatron model shares them.
    values = [value for module in model.modules() for value in vars(module).values()]
    owned = getattr(model, "pg_collection", None) or model.model_comm_pgs  # Until 0.14.
    values += list(vars(owned).values())
    groups = {id(v): v for v in values if isinstance(v, torch.distributed.ProcessGroup)}
    with tensortap.attach(model, sink, on_error="raise"):
        model(**built.batch()).sum().backward()
        twin = copy.deepcopy(model, dict(groups))
        twin(**built.batch()).sum().backward()
    assert len(sink.records) == len(captured(model).records)
    assert len(captured(twin).records) == len(sink.records)


def state(module: nn.Module) -> dict[str, Any]:
    """All that a module holds, its containers as they are now."""
    containers = (dict, list, set)
    return {k: copy.copy(v) if isinstance(v, containers) else v for k, v in vars(module).items()}


def test_detach_leaves_modules_parameters_and_megatrons_optimizers_as_they_were() -> None:
    from megatron.core.optimizer import optimizer

    kinds = [optimizer.MixedPrecisionOptimizer, optimizer.FP32Optimizer, optimizer.ChainedOptimizer]
    model = built.gpt(num_layers=1)
    before = [state(module) for module in model.modules()]
    classes = [dict(vars(kind)) for kind in kinds]
    hooks = [parameter._post_accumulate_grad_hooks for parameter in model.parameters()]
    with tensortap.attach(model, MemorySink(), values="full", on_error="raise"):
        assert [dict(vars(kind)) for kind in kinds] != classes
        model(**built.batch()).sum().backward()
    assert [state(module) for module in model.modules()] == before
    assert [dict(vars(kind)) for kind in kinds] == classes
    assert [p._post_accumulate_grad_hooks for p in model.parameters()] == hooks


def test_a_model_without_megatron_modules_is_refused_with_the_reason() -> None:
    with pytest.raises(NotSupported, match="Sequential holds no Megatron-core module"):
        tensortap.attach(nn.Sequential(nn.Linear(2, 2)), MemorySink(), using="megatron")


RECOMPUTE = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


@pytest.mark.parametrize("granularity", list(RECOMPUTE))
def test_activation_recomputation_shows_the_same_numbers_again_and_changes_none(
    granularity: str,
) -> None:
    plain, again = built.gpt(), built.gpt(**RECOMPUTE[granularity])
    expected = built.gradients(plain)
    seen = captured(plain)
    untapped = built.gradients(again)
    sink = MemorySink()
    with tensortap.attach(again, sink, values="full", on_error="raise"):
        tapped = built.gradients(again)
    assert all(torch.equal(tensor, tapped[name]) for name, tensor in untapped.items())
    assert all(torch.equal(tensor, tapped[name]) for name, tensor in expected.items())
    assert {name for name in seen.names() if "/forward/" in name} <= set(sink.names())
    repeated = 0
    for record, value in zip(sink.records, sink.payloads, strict=True):
        if record.at.recompute and record.name.phase == "forward":
            first = [v for r, v in sink.find(str(record.name)) if not r.at.recompute]
            assert any(torch.equal(value, other) for other in first), str(record.name)
            repeated += 1
    assert repeated > (20 if granularity == "full" else 5)
    for module in ("layers.0.attn.core", "layers.1.attn.core"):
        [(_, gradient)] = sink.find(f"{module}/backward/grad_context")
        assert gradient.shape == (40, 2, 64)
