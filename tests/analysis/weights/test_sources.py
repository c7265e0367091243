import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tests.analysis.weights.checkpoints import (
    assert_same,
    read,
    reasons,
    safetensors_folder,
    small_state,
)
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from transformers import GPT2Config, GPT2LMHeadModel

from tensortap_analysis.weights import CheckpointError, Scope
from tensortap_analysis.weights.sources import safetensors_files

DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"
)  # fmt: skip


def by_layer(model):
    return {weight.layer: weight for weight in Scope(model).source.weights}


def test_a_safetensors_file_gives_every_weight_as_it_is(tmp_path):
    state = {f"{dtype}.weight": torch.randn(3, 5).to(getattr(torch, dtype)) for dtype in DTYPES}
    save_file(state, tmp_path / "x.safetensors")
    found = read(tmp_path / "x.safetensors")
    for name, tensor in state.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_the_header_of_a_file_is_parsed_once_however_many_tensors_it_has(tmp_path, monkeypatch):
    state = {f"experts.{n}.weight": torch.randn(2, 3) for n in range(50)}
    save_file(state | {"none.weight": torch.zeros(0, 3)}, tmp_path / "x.safetensors")
    opened = []
    real = safetensors_files.safe_open
    monkeypatch.setattr(
        safetensors_files, "safe_open", lambda *a, **k: (opened.append(a), real(*a, **k))[1]
    )
    found = read(tmp_path / "x.safetensors")
    assert len(opened) == 1
    assert all(torch.equal(found[name], one) for name, one in state.items())
    assert found["none.weight"].shape == (0, 3)


def test_weights_come_layer_by_layer_though_files_sort_by_text(tmp_path):
    state = {f"layers.{n}.weight": torch.ones(2, 2) * n for n in (10, 2, 1)}
    save_file(state, tmp_path / "x.safetensors")
    assert list(read(tmp_path / "x.safetensors")) == [f"layers.{n}.weight" for n in (1, 2, 10)]


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_with_shards_gives_the_same_as_one_without(tmp_path, shards):
    state = small_state()
    assert_same(read(safetensors_folder(tmp_path / "m", state, shards)), state)


def test_only_shards_of_the_index_are_read(tmp_path):
    folder = safetensors_folder(tmp_path / "m", small_state(), 2)
    save_file({"old.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")
    assert "old.weight" not in read(folder)


def test_bin_shards_with_an_index_are_read(tmp_path):
    state, where = small_state(), {}
    for number, name in enumerate(state):
        file = f"pytorch_model-{number % 2}.bin"
        where[name] = file
    for file in set(where.values()):
        torch.save({name: state[name] for name in state if where[name] == file}, tmp_path / file)
    index = {"weight_map": where}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(read(tmp_path), state)


def hub(root, name, files, monkeypatch):
    """A model in the layout of huggingface_hub's cache, links and all."""
    home = root / f"models--{name.replace('/', '--')}"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for file in files.iterdir():
        shutil.copy(file, home / "blobs" / file.name)
        os.symlink(f"../../blobs/{file.name}", snapshot / file.name)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(root))
    return home


def test_a_name_of_the_hub_is_read_from_the_local_cache(tmp_path, monkeypatch):
    state = small_state()
    files = safetensors_folder(tmp_path / "m", state, 2)
    hub(tmp_path / "hub", "org/model-1", files, monkeypatch)
    assert_same(read("org/model-1"), state)
    assert_same(read("org/model-1@abc123"), state)


def test_a_name_that_is_not_in_the_cache_is_said_and_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="Nothing is downloaded"):
        Scope("org/absent")


def test_a_revision_that_is_not_in_the_cache_names_those_that_are(tmp_path, monkeypatch):
    files = safetensors_folder(tmp_path / "m", small_state())
    hub(tmp_path / "hub", "org/model", files, monkeypatch)
    with pytest.raises(CheckpointError, match="abc123"):
        Scope("org/model@v2")


@pytest.mark.parametrize("nesting", [(), ("model",), ("state_dict",), ("model", "module")])
def test_a_state_dict_is_found_below_the_keys_of_training_scripts(tmp_path, nesting):
    state = small_state()
    content = dict(state)
    for key in reversed(nesting):
        content = {key: content, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    torch.save(content, tmp_path / "x.pt")
    assert_same(read(tmp_path / "x.pt"), state)
    assert ("optimizer" in reasons(tmp_path / "x.pt")) == bool(nesting)


def test_views_strides_and_small_storages_of_a_state_dict_read_right(tmp_path):
    base = torch.randn(40, 50)
    state = {
        "whole.weight": base,
        "turned.weight": torch.randn(7, 9).t(),
        "rows.weight": base[3:9],
        "columns.weight": base[:, 5:8],
        "half.weight": torch.randn(3, 3).bfloat16(),
        "empty.weight": torch.empty(0, 4),
        "scalar": torch.tensor(2.0),
    }
    torch.save(state, tmp_path / "x.pt")
    assert_same(read(tmp_path / "x.pt"), state)


def test_each_weight_of_a_state_dict_has_a_mapping_of_its_own(tmp_path):
    torch.save({f"{n}.weight": torch.randn(64, 64) for n in range(8)}, tmp_path / "x.pt")
    tensors = [weight.read() for weight in Scope(tmp_path / "x.pt").source.weights]
    assert len({tensor.untyped_storage()._cdata for tensor in tensors}) == 8
    assert max(tensor.untyped_storage().nbytes() for tensor in tensors) < 200_000


def test_the_old_format_of_torch_save_is_read_and_said(tmp_path):
    state = small_state()
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    assert_same(read(tmp_path / "x.bin"), state)
    assert "in memory as a whole" in Scope(tmp_path / "x.bin").source.notes[0]


def test_tied_tensors_of_a_state_dict_are_counted_once(tmp_path):
    state = small_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, tmp_path / "x.pt")
    assert "lm_head.weight" not in read(tmp_path / "x.pt")
    assert "tied to model.embed_tokens.weight" in reasons(tmp_path / "x.pt")["lm_head.weight"]


def test_a_distributed_checkpoint_is_read_and_its_optimizer_left_out(tmp_path):
    state = small_state()
    moments = {f"optim.state.{name}.exp_avg": torch.ones(3) for name in list(state)[:2]}
    dcp.save({**state, **moments, "step": 7}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert_same(read(tmp_path / "c"), state)
    why = reasons(tmp_path / "c")
    assert {why[name] for name in moments} == {"state of the optimizer"}
    assert why["step"] == "no tensor"


def test_a_live_module_is_read_by_its_own_names_and_tied_parameters_once():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))
    found = read(model)
    wanted = {name: value.detach() for name, value in model.named_parameters()}
    assert_same(found, wanted)
    assert "tied to transformer.wte.weight" in reasons(model)["lm_head.weight"]


def test_parameters_without_values_are_skipped_with_the_reason():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.LazyLinear(3), nn.Linear(2, 2))
    assert set(read(model)) == {"2.weight", "2.bias"}
    assert set(reasons(model).values()) == {"has no values yet"}


def test_conv1d_of_gpt2_lies_in_out_in_a_module_and_in_a_file_alike(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50))
    model.save_pretrained(tmp_path / "m")
    for source in (model, tmp_path / "m"):
        found = by_layer(source)
        turned = {layer.rpartition(".")[2] for layer, one in found.items() if one.transposed}
        assert turned == {"c_attn", "c_proj", "c_fc"}
        [matrix] = found["transformer.h.0.attn.c_attn"].matrices()
        assert torch.equal(matrix, model.transformer.h[0].attn.c_attn.weight.detach().T)
        square = found["transformer.h.1.attn.c_proj"]
        assert square.shape == (16, 16)
        assert square.transposed


def test_a_linear_layer_with_a_bias_is_not_turned(tmp_path):
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 7))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    assert not any(weight.transposed for weight in Scope(tmp_path / "x.pt").source.weights)


def test_kinds_follow_shape_and_name(tmp_path):
    state = {
        "model.embed_tokens.weight": torch.randn(10, 4),
        "visual.patch_embed.proj.weight": torch.randn(8, 3, 2, 2),
        "mixer.conv1d.weight": torch.randn(12, 1, 4),
        "mlp.experts.gate_up_proj": torch.randn(3, 8, 4),
        "stack": torch.randn(3, 8, 40),
        "norm.weight": torch.randn(4),
        "scale": torch.tensor(1.0),
        "proj.weight": torch.randn(4, 4),
        "mixer.A_log": torch.randn(8, 4),
        "attn.relative_position_bias_table": torch.randn(9, 2),
        "experts.down_proj_bias": torch.randn(3, 8),
        "attn.in_proj_weight": torch.randn(12, 4),
        "att.time_maa_w1": torch.randn(4, 8),
        "relative_attention_bias.weight": torch.randn(32, 2),
    }
    save_file(state, tmp_path / "x.safetensors")
    found = by_layer(tmp_path / "x.safetensors")
    assert {layer: weight.kind for layer, weight in found.items()} == {
        "model.embed_tokens": "embedding",
        "visual.patch_embed.proj": "convolution",
        "mixer.conv1d": "convolution",
        "mlp.experts.gate_up_proj": "experts",
        "stack": "experts",
        "norm": "vector",
        "scale": "vector",
        "proj": "linear",
        "mixer.A_log": "table",
        "attn.relative_position_bias_table": "table",
        "experts.down_proj_bias": "table",
        "attn.in_proj_weight": "linear",
        "att.time_maa_w1": "linear",
        "relative_attention_bias": "embedding",
    }
    [patches] = found["visual.patch_embed.proj"].matrices()
    assert patches.shape == (8, 12)
    assert [one.shape for one in found["mlp.experts.gate_up_proj"].matrices()] == [(8, 4)] * 3
    assert found["stack"].note == "three axes, read as a stack of matrices"


@pytest.mark.parametrize("turned", [False, True])
def test_stacks_of_experts_lie_by_the_hidden_size(tmp_path, turned):
    up, down = torch.randn(2, 12, 4), torch.randn(2, 4, 6)
    state = {"mlp.experts.gate_up_proj": up, "mlp.experts.down_proj": down}
    if turned:
        state = {name: tensor.transpose(1, 2).contiguous() for name, tensor in state.items()}
    folder = safetensors_folder(tmp_path / "m", state, config={"hidden_size": 4})
    found = by_layer(folder)
    for name, wanted in (("mlp.experts.gate_up_proj", up), ("mlp.experts.down_proj", down)):
        assert torch.equal(torch.stack(list(found[name].matrices())), wanted)


@pytest.mark.parametrize("both", [False, True])
def test_square_experts_lie_as_those_beside_them(tmp_path, both):
    """As in gpt-oss, where a hidden size is also that inside of an expert."""
    up, down = torch.randn(2, 8, 4), torch.randn(2, 4, 4)
    state = {"mlp.experts.gate_up_proj": up, "mlp.experts.down_proj": down}
    if both:
        state = {name: tensor.transpose(1, 2).contiguous() for name, tensor in state.items()}
    found = by_layer(safetensors_folder(tmp_path / "m", state, config={"hidden_size": 4}))
    for name, wanted in (("mlp.experts.gate_up_proj", up), ("mlp.experts.down_proj", down)):
        assert torch.equal(torch.stack(list(found[name].matrices())), wanted)


EMBEDDINGS = (
    "model.embed_tokens", "embeddings.word_embeddings", "transformer.wte", "tok_embeddings",
    "embedding.position_embeddings", "shared", "decoder.embed_positions", "gpt_neox.embed_in",
)  # fmt: skip
PRODUCTS = (
    "embed_out", "time_embedding.linear_1", "t_embedder.mlp.0", "embeddings_project",
    "encoder.embedding_hidden_mapping_in", "visual.patch_embed", "embed_tokens_proj.linear",
)  # fmt: skip


def test_an_embedding_is_told_by_the_last_word_of_its_name(tmp_path):
    state = {f"{name}.weight": torch.randn(6, 4) for name in EMBEDDINGS + PRODUCTS}
    save_file(state, tmp_path / "x.safetensors")
    found = by_layer(tmp_path / "x.safetensors")
    assert {name for name, one in found.items() if one.kind == "embedding"} == set(EMBEDDINGS)
    assert {name for name, one in found.items() if one.kind == "linear"} == set(PRODUCTS)


def test_modules_say_what_their_weights_are_whatever_they_are_called():
    embed = nn.Linear(4, 6)
    found = by_layer(nn.ModuleDict({"0": nn.Embedding(5, 4), "word_embeddings": embed}))
    assert found["0"].kind == "embedding"
    assert found["word_embeddings"].kind == "linear"


def test_class_tokens_and_tables_of_positions_are_no_stacks_of_experts(tmp_path):
    shapes = {"cls_token": (1, 1, 32), "mask_token": (1, 32), "position_embeddings": (1, 9, 32)}
    state = {f"embeddings.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    state["head.weight"] = torch.randn(1, 32)
    save_file(state, tmp_path / "x.safetensors")
    kinds = [by_layer(tmp_path / "x.safetensors")[f"embeddings.{name}"].kind for name in shapes]
    assert kinds == ["vector", "vector", "table"]
    assert by_layer(tmp_path / "x.safetensors")["head"].kind == "linear"


def test_a_stack_of_countless_empty_matrices_is_left_out(tmp_path):
    state = {"x.weight": torch.ones(2, 2), "mlp.experts.w": torch.zeros(1 << 24, 0, 4)}
    save_file(state, tmp_path / "x.safetensors")
    assert reasons(tmp_path / "x.safetensors")["mlp.experts.w"] == "16777216 x 0 x 4 has no values"


def test_integers_are_no_weights_and_say_so(tmp_path):
    state = {"position_ids": torch.arange(9), "lut": torch.ones(2, 2, dtype=torch.int8)}
    save_file({**state, "x.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    why = reasons(tmp_path / "x.safetensors")
    assert why["position_ids"] == "int64 values are no weights"
    assert "int8 without scales" in why["lut"]


def test_a_checkpoint_without_weights_is_an_error(tmp_path):
    save_file({"ids": torch.arange(3)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="holds no weights: ids"):
        Scope(tmp_path / "x.safetensors")


def test_a_parameter_named_as_another_module_keeps_its_whole_name(tmp_path):
    save_file({"a": torch.ones(2, 2), "a.weight": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    assert set(by_layer(tmp_path / "x.safetensors")) == {"a", "a.weight"}


def test_a_folder_of_models_names_those_below_and_one_of_many_files_those_beside(tmp_path):
    for name in ("unet", "vae"):
        safetensors_folder(tmp_path / name, small_state(1))
    with pytest.raises(CheckpointError, match=r"Scan one of: unet/, vae/\."):
        Scope(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(small_state(1), tmp_path / name)
    with pytest.raises(CheckpointError, match=r"Scan one of: a\.pt, b\.pt\."):
        Scope(tmp_path)


def test_layers_that_megatron_stacks_are_weights_of_their_own(tmp_path):
    stacked, alone = torch.randn(3, 8, 4), torch.randn(6, 4)
    state = {
        "embedding.word_embeddings.weight": alone,
        "decoder.layers.mlp.linear_fc1.weight": stacked,
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": torch.ones(3, 4),
        "decoder.layers.mlp.experts.linear_fc2.weight": torch.randn(3, 2, 4, 8),
        "decoder.final_layernorm.weight": torch.ones(4),
    }
    folder = tmp_path / "iter_0000007"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    found = by_layer(tmp_path)
    layer = ["mlp.linear_fc1", "mlp.linear_fc1.layer_norm_weight", "mlp.experts.linear_fc2"]
    assert list(found) == [
        "embedding.word_embeddings",
        *(f"decoder.layers.{n}.{word}" for n in range(3) for word in layer),
        "decoder.final_layernorm",
    ]
    assert torch.equal(found["decoder.layers.2.mlp.linear_fc1"].read(), stacked[2])
    assert found["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"].kind == "vector"
    assert found["decoder.layers.1.mlp.experts.linear_fc2"].kind == "experts"


def test_chunks_of_several_ranks_are_put_together(tmp_path):
    whole = torch.arange(6 * 4.0).view(6, 4)
    folder = tmp_path / "c"
    dcp.save({"a.weight": whole[:3].contiguous()}, checkpoint_id=folder, no_dist=True)
    dcp.save({"a.weight": whole[3:].contiguous()}, checkpoint_id=tmp_path / "d", no_dist=True)
    [file] = folder.glob("*.distcp")
    [other] = (tmp_path / "d").glob("*.distcp")
    shutil.copy(other, folder / "__1_0.distcp")
    content = pickle.loads((folder / ".metadata").read_bytes())
    facts = content.state_dict_metadata["a.weight"]
    facts.size = torch.Size([6, 4])
    facts.chunks = [
        ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([3, 4])) for start in (0, 3)
    ]
    [place] = content.storage_data.values()
    content.storage_data = {
        MetadataIndex("a.weight", torch.Size([0, 0])): place,
        MetadataIndex("a.weight", torch.Size([3, 0])): replace(
            place, relative_path="__1_0.distcp", length=other.stat().st_size
        ),
    }
    (folder / ".metadata").write_bytes(pickle.dumps(content))
    assert_same(read(folder), {"a.weight": whole})
    assert file.exists()
