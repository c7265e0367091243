"""`quantize` on whole models: what it selects, refuses and leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.megatron import quantize_layers as built
from tests.megatron.quantize_layers import batch, gradients
from torch import nn

from tensortap import (
    AlreadyAttached,
    CaptureWarning,
    ConfigError,
    NotSupported,
    SelectionError,
    formats,
)
from tensortap_megatron.quantization import format_of, quantize


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with built.ranks():
        yield


@pytest.fixture
def model() -> Any:
    return built.gpt()


def state(model: nn.Module) -> dict[str, Any]:
    """Everything an edit could change: instances, their classes, and torch's products."""
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = {
        name: {key: list(value) for key, value in fields.items() if key.endswith("_hooks")}
        for name, fields in modules.items()
    }
    classes = {type(m): dict(vars(type(m))) for m in model.modules()}
    return {"modules": modules, "hooks": hooks, "classes": classes, "bmm": torch.bmm}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


LAYER = ("attn.core", "attn.out", "attn.qkv", "mlp.gate_up", "mlp.down")


def test_every_linear_layer_and_attention_core_but_the_head_is_quantised(model: Any) -> None:
    with quantize(model, "mxfp4") as quantised:
        assert set(quantised.modules) == {f"layers.{n}.{w}" for n in (0, 1) for w in LAYER}
    with quantize(model, "mxfp4", select="*") as quantised:
        assert "lm_head" in quantised.modules


def test_undo_leaves_the_model_exactly_as_it_was(model: Any) -> None:
    before, plain = state(model), gradients(model)
    with quantize(model, "mxfp4"):
        assert not equal(gradients(model), plain)
    assert state(model) == before
    assert equal(gradients(model), plain)


def test_undo_runs_when_the_body_raises(model: Any) -> None:
    before = state(model)
    with pytest.raises(KeyError):
        with quantize(model, "mxfp4"):
            raise KeyError
    assert state(model) == before
    assert format_of(model) is None


def test_what_quantize_returns_can_be_removed_by_hand_once_or_twice(model: Any) -> None:
    before = state(model)
    quantised = quantize(model, "hifp8")
    assert format_of(model) == "hifp8"
    quantised.remove()
    quantised.remove()
    assert format_of(model) is None
    assert state(model) == before


def test_two_formats_may_share_a_model_but_not_a_module(model: Any) -> None:
    with quantize(model, "mxfp8", select="*.attn.*"):
        before = state(model)
        with pytest.raises(AlreadyAttached, match=r"attn\.core is quantised to mxfp8 already"):
            quantize(model, "mxfp4")
        assert state(model) == before
        with quantize(model, "mxfp4", select="*.mlp.*"):
            assert format_of(model) == "mxfp4,mxfp8"
        assert format_of(model) == "mxfp8"


def test_a_selection_decides_which_products_are_quantised(model: Any) -> None:
    plain = gradients(model)
    with quantize(model, "mxfp4", select="layers.1.mlp.down") as quantised:
        assert quantised.modules == ("layers.1.mlp.down",)
        found = gradients(model)
    assert not torch.equal(found["losses"], plain["losses"])
    with quantize(model, "mxfp4", select=["layers.*.attn.*", "!layers.0.*"]) as quantised:
        assert quantised.modules == tuple(f"layers.1.{word}" for word in LAYER[:3])


def test_the_head_is_quantised_when_selected_also_with_the_weight_of_the_embedding() -> None:
    model = built.gpt(tied=True)
    plain = gradients(model)
    with quantize(model, "mxfp4", select="lm_head") as quantised:
        assert quantised.modules == ("lm_head",)
        found = gradients(model)
    name = "embedding.word_embeddings.weight"
    for key in ("losses", name):
        error = (found[key] - plain[key]).norm() / plain[key].norm()
        assert 0 < error < 0.3, key


def test_a_selection_of_nothing_that_can_be_quantised_lists_near_misses(model: Any) -> None:
    for select in ("layers.*.mlp.dwn", "layers.7.*", "embed", "layers.*.attn.qkv/forward/*"):
        with pytest.raises(SelectionError, match=r"Closest names: 'l"):
            quantize(model, "mxfp4", select=select)


def test_a_selection_may_name_layers_of_another_pipeline_stage(model: Any) -> None:
    model.config.pipeline_model_parallel_size = 2
    model.config.num_layers = 4
    with quantize(model, "mxfp4", select="layers.3.*") as quantised:
        assert quantised.modules == ()
        assert format_of(model) == "mxfp4"
    with pytest.raises(SelectionError):
        quantize(model, "mxfp4", select="layers.4.*")


def test_a_selection_may_name_experts_of_another_rank() -> None:
    model = built.gpt(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=96)
    model.config.expert_model_parallel_size = 2
    model.config.num_moe_experts = 8
    with quantize(model, "mxfp4", select="layers.0.mlp.experts.6.*") as quantised:
        assert quantised.modules == ()
    with pytest.raises(SelectionError, match=r"experts\."):
        quantize(model, "mxfp4", select="layers.0.mlp.experts.8.*")


def test_the_environment_names_the_format(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"CUSTOM_QUANT_TYPE is not set.* hifp8, mxfp8"):
        quantize(model)
    monkeypatch.setenv("CUSTOM_QUANT_TYPE", "mxfp5")
    with pytest.raises(ConfigError, match=r"CUSTOM_QUANT_TYPE='mxfp5' .* hifp8, mxfp8"):
        quantize(model)
    monkeypatch.setenv("CUSTOM_QUANT_TYPE", "mxfp8")
    with quantize(model):
        assert format_of(model) == "mxfp8"
    with quantize(model, "bf16"):
        assert format_of(model) == "bf16"


def test_options_are_those_of_the_format(model: Any) -> None:
    with quantize(model, "hifp8", rounding="hybrid") as quantised:
        assert quantised.format.rounding == "hybrid"
        hybrid = gradients(model)
    with quantize(model, "hifp8"):
        assert not equal(gradients(model), hybrid)
    with pytest.raises(ConfigError, match="no option 'rounding'"):
        quantize(model, "mxfp4", rounding="hybrid")


def test_hifp8_saturates_unless_it_is_told_otherwise() -> None:
    layers = built.layers(tensor=1, sequence_parallel=False)
    x = torch.full((1, 1, built.IN), 1e6, dtype=torch.float64)
    with quantize(layers, "hifp8"):
        assert layers["column"](x)[0].isfinite().all()
    with quantize(layers, "hifp8", overflow="inf"):
        assert not layers["column"](x)[0].isfinite().any()


def test_a_wrapped_model_and_a_list_of_chunks_are_quantised_inside(model: Any) -> None:
    from megatron.core.transformer.module import Float16Module

    model.config.bf16 = True
    wrapped = Float16Module(model.config, model)
    with quantize([wrapped, built.gpt(seed=1)], "mxfp4", select="layers.0.mlp.down") as quantised:
        assert quantised.modules == ("layers.0.mlp.down", "layers.0.mlp.down")
        assert format_of(wrapped) == format_of(model) == "mxfp4"


def test_gradients_reach_the_buffers_of_megatrons_data_parallelism(model: Any) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    with quantize(model, "mxfp4"):
        wanted = gradients(model)
    model.zero_grad()
    parallel = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    with quantize(parallel, "mxfp4"):
        parallel(**batch()).mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.main_grad, wanted[name]), name


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_activations_give_the_same_gradients(recompute: str) -> None:
    more = {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute == "full" else {}
    plain = built.gpt()
    saving = built.gpt(recompute_granularity=recompute, **more)
    with quantize([plain], "mxfp4"), quantize([saving], "mxfp4"):
        assert equal(gradients(plain), gradients(saving))


def test_a_bfloat16_model_stays_in_bfloat16(model: Any) -> None:
    model = built.gpt(bf16=True, params_dtype=torch.bfloat16).bfloat16()
    plain = gradients(model)
    with quantize(model, "bf16"):
        assert equal(gradients(model), plain)
    with quantize(model, "mxfp4"):
        found = gradients(model)
    assert all(found[key].dtype is plain[key].dtype for key in plain)
    assert not equal(found, plain)


def test_no_graph_is_kept_when_gradients_are_off(model: Any) -> None:
    with quantize(model, "mxfp4"), torch.no_grad():
        assert model(**batch()).grad_fn is None


def test_a_copy_of_a_quantised_layer_is_a_plain_layer(model: Any) -> None:
    layer = model.decoder.layers[0].mlp.linear_fc2
    layer.tp_group = None  # What keeps Megatron's layers from being copied at all.
    hidden = torch.randn(3, 1, 96)
    plain = layer(hidden)[0]
    with quantize(model, "mxfp4"):
        assert not torch.equal(layer(hidden)[0], plain)
        assert torch.equal(copy.deepcopy(layer)(hidden)[0], plain)


def test_the_experts_of_a_mixture_are_quantised_one_by_one() -> None:
    model = built.gpt(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=96)
    plain = gradients(model)
    with quantize(model, "mxfp4", select="*.experts.*") as quantised:
        assert "layers.1.mlp.experts.3.down" in quantised.modules
        assert not torch.equal(gradients(model)["losses"], plain["losses"])


class TestRefusals:
    """Nothing is left out in silence, and the model is untouched after an error."""

    def refused(self, model: nn.Module, *words: str, **options: Any) -> None:
        before = state(model)
        with pytest.raises(NotSupported) as raised:
            quantize(model, "mxfp4", **options)
        for word in words:
            assert word in str(raised.value)
        assert state(model) == before

    def test_gradient_accumulation_fusion(self, model: Any) -> None:
        model.decoder.layers[1].mlp.linear_fc2.gradient_accumulation_fusion = True
        self.refused(model, "layers.1.mlp.down", "gradient_accumulation_fusion", "set it to False")

    def test_gradient_accumulation_fusion_that_is_turned_on_later(self, model: Any) -> None:
        with quantize(model, "mxfp4"):
            model.decoder.layers[1].mlp.linear_fc2.gradient_accumulation_fusion = True
            with pytest.raises(NotSupported, match="gradient_accumulation_fusion"):
                model(**batch())

    def test_deferred_weight_gradients_of_the_head(self, model: Any) -> None:
        model.config.defer_embedding_wgrad_compute = True
        self.refused(model, "defer_embedding_wgrad_compute")

    @pytest.mark.parametrize("word", ["fp8", "fp4"])
    def test_the_fp8_of_transformer_engine(self, model: Any, word: str) -> None:
        setattr(model.config, word, "e4m3")
        self.refused(model, f"config.{word}='e4m3'", "Transformer Engine")

    def test_cuda_graphs(self, model: Any) -> None:
        model.config.cuda_graph_impl = "local"
        self.refused(model, "CUDA graph")

    def test_modules_of_transformer_engine_by_their_names(self, model: Any) -> None:
        class FakeTELinear(nn.Module):
            pass

        FakeTELinear.__module__ = "megatron.core.extensions.transformer_engine"
        FakeTELinear.__qualname__ = "TELayerNormColumnParallelLinear"
        for layer in model.decoder.layers:
            layer.self_attention.linear_qkv = FakeTELinear()
        exclude = "select='*,!lm_head,!layers.*.attn.qkv'"
        self.refused(model, "layers.0.attn.qkv", "1 more", "local layer spec", exclude)
        with quantize(model, "mxfp4", select="*,!lm_head,!layers.*.attn.qkv") as quantised:
            assert len(quantised.modules) == 8

    def test_experts_in_one_grouped_kernel(self, model: Any) -> None:
        from megatron.core.transformer.moe.experts import GroupedMLP

        grouped = GroupedMLP.__new__(GroupedMLP)  # Its kernel is a package of its own.
        nn.Module.__init__(grouped)
        model.decoder.layers[1].mlp = grouped
        self.refused(model, "layers.1.mlp", "SequentialMLP", "moe_grouped_gemm=False")

    def test_another_attention_core(self, model: Any) -> None:
        model.decoder.layers[0].self_attention.core_attention = nn.Identity()
        self.refused(model, "layers.0.attn.core", "DotProductAttention")

    def test_linear_layers_of_torch(self, model: Any) -> None:
        model.decoder.layers[0].adapter = nn.Linear(4, 4)
        self.refused(model, "layers.0.adapter", "torch.nn.Linear")

    def test_a_layer_that_somebody_else_has_changed(self, model: Any) -> None:
        from megatron.core.tensor_parallel.layers import RowParallelLinear

        class Mine(RowParallelLinear):
            def _forward_impl(self, *args: Any, **kwargs: Any) -> Any:
                return 2 * super()._forward_impl(*args, **kwargs)

        model.decoder.layers[0].mlp.linear_fc2.__class__ = Mine
        self.refused(model, "layers.0.mlp.down", "_forward_impl")

    def test_a_model_without_megatron(self) -> None:
        with pytest.raises(SelectionError, match="matches nothing in Sequential"):
            quantize(nn.Sequential(nn.ReLU()), "mxfp4")
        with pytest.raises(ConfigError, match="empty list"):
            quantize([], "mxfp4")


@pytest.mark.parametrize("format", formats.names())
def test_training_in_every_format_lowers_the_loss(format: str) -> None:
    model = built.gpt(num_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with quantize(model, format):
        for _ in range(20):
            losses.append(gradients(model)["losses"].mean().item())
            optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_pattern_that_matches_no_product_is_said() -> None:
    model = built.gpt(num_layers=1)
    with pytest.warns(CaptureWarning, match=r"'layers.0' matches no matrix product"):
        quantize(model, "MXFP4", select="*,!layers.0").remove()
