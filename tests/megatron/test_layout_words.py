"""Names of the old fork's files: what is written, and what is understood."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.core.store.building import record

from tensortap import ConfigError, FormatInfo, TensorName
from tensortap_megatron.layout.words import canonical, old_name, parse

MOMENT = "20250908_092156"


def written(name, counter=1, run_format="hifp8", dtype=torch.float32, **fields):
    made = record(name, torch.zeros(2, dtype=dtype), **fields)
    return old_name(made, run_format, MOMENT, counter).file_name


def split_as_the_old_visualiser_did(file_name):
    """Fields by underscores: date, time, counter, layer type, maybe L<n>, then three more."""
    fields = file_name.removesuffix(".pt").split("_")
    layer = re.fullmatch(r"L(\d+)", fields[4])
    operation, quant_type, *tensor = fields[5:] if layer else fields[4:]
    return {
        "counter": int(fields[2]),
        "layer_type": fields[3],
        "layer": int(layer.group(1)) if layer else None,
        "operation": operation,
        "quant_type": quant_type,
        "tensor": "_".join(tensor),
    }


@pytest.mark.parametrize(
    ("name", "counter", "file_name"),
    [
        ("layers.0.attn.core/forward/query", 1, "0001_attention_L0_forward_hifp8_query"),
        ("layers.0.attn.core/forward/context", 4, "0004_attention_L0_forward_hifp8_output"),
        ("layers.1.mlp.up/forward/input", 5, "0005_linear_L1_forward_hifp8_input"),
        ("layers.1.attn.qkv/forward/weight", 6, "0006_linear_L1_forward_hifp8_weight"),
        ("layers.1.attn.out/forward/output", 7, "0007_linear_L1_forward_hifp8_output"),
        ("layers.1.mlp.down/backward/grad_output", 8, "0008_linear_L1_backward_hifp8_input"),
        ("layers.1.mlp.down/backward/weight", 9, "0009_linear_L1_backward_hifp8_weight"),
        ("layers.1.mlp.down/backward/grad_input", 10, "0010_linear_L1_backward_hifp8_output"),
    ],
)
def test_what_the_fork_wrote_has_exactly_its_names(name, counter, file_name):
    assert written(name, counter) == f"{MOMENT}_{file_name}.pt"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.3.attn.core/forward/probs", "attention_L3_forward_hifp8_probs"),
        ("layers.3.attn.core/backward/grad_context", "attention_L3_backward_hifp8_input"),
        ("layers.3.attn.core/backward/grad_query", "attention_L3_backward_hifp8_grad-query"),
        (
            "layers.3.attn.out/backward/grad_input_local",
            "linear_L3_backward_hifp8_grad-input-local",
        ),
        ("layers.3.mlp.down/param/weight", "linear_L3_param_hifp8_weight"),
        ("layers.3.mlp.down/grad/weight", "linear_L3_grad_hifp8_weight"),
        ("layers.3.mlp.experts.7.up/forward/input", "linear_L3_forward_hifp8_input"),
        ("layers.3.mlp.shared_expert.up/forward/input", "linear_L3_forward_hifp8_input"),
        ("layers.3.cross_attn.kv/forward/input", "linear_L3_forward_hifp8_input"),
        ("layers.3.cross_attn.core/forward/context", "attention_L3_forward_hifp8_output"),
        ("embed.position/forward/output", "position_forward_hifp8_output"),
        ("layers.3.mlp.router/forward/output", "router_L3_forward_hifp8_output"),
        ("layers.3.input_norm/backward/grad_output", "inputnorm_L3_backward_hifp8_input"),
        ("layers.3/forward/input.1", "layer_L3_forward_hifp8_input-1"),
        ("layers.3.mixer.in_proj/forward/output", "linear_L3_forward_hifp8_output"),
        ("embed/forward/output", "embed_forward_hifp8_output"),
        ("final_norm/forward/output", "finalnorm_forward_hifp8_output"),
        ("lm_head/forward/output", "linear_forward_hifp8_output"),
        ("my.own_thing/forward/x_y", "ownthing_forward_hifp8_x-y"),
        ("%20%21/forward/output", "20_forward_hifp8_output"),
        ("decoder.layers.2.mlp.linear_fc1/forward/output", "linear_L2_forward_hifp8_output"),
    ],
)
def test_what_the_fork_could_not_say_is_still_split_by_its_parser(name, words):
    file_name = written(name)
    expected = words.replace("20_forward", "module_forward")
    assert file_name == f"{MOMENT}_0001_{expected}.pt"
    fields = split_as_the_old_visualiser_did(file_name)
    assert fields["operation"] == TensorName.parse(name).phase
    assert fields["quant_type"] == "hifp8"
    assert fields["tensor"]
    assert parse(file_name).file_name == file_name


def test_the_quant_type_is_the_records_format_or_the_runs_or_the_dtype():
    name = "layers.0.attn.q/forward/output"
    exact = FormatInfo("mxfp8_e5m2", 32)
    assert "_mxfp8-e5m2_" in written(name, format=exact)
    assert "_hifp8_" in written(name)
    words = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    words[torch.int64] = "int64"
    for dtype, word in words.items():
        fields = split_as_the_old_visualiser_did(written(name, run_format=None, dtype=dtype))
        assert fields["quant_type"] == word


def test_a_counter_beyond_four_digits_grows():
    assert "_12345_" in written("embed/forward/output", 12345)


def test_a_sample_of_a_tensor_says_so():
    made = record("embed/forward/output", torch.zeros(4), values="sample", stride=1)
    assert old_name(made, None, MOMENT, 1).file_name.endswith("_output-sample.pt")


WORDS = st.text(
    st.characters(blacklist_categories=("Cs", "Z", "Cc"), blacklist_characters="/,"), min_size=1
)


@given(
    module=st.lists(WORDS | st.sampled_from(["layers", "7", "attn", "L2"]), min_size=1).map(
        ".".join
    ),
    phase=st.sampled_from(["forward", "backward", "param", "grad"]),
    tensor=WORDS,
    run_format=st.none() | WORDS,
)
def test_any_name_at_all_becomes_a_file_name_that_both_parsers_read(
    module, phase, tensor, run_format
):
    try:
        name = TensorName(module, phase, tensor)
    except ConfigError:
        assume(False)
    made = record(str(name), torch.zeros(2))
    old = old_name(made, run_format, MOMENT, 7)
    assert len(old.file_name.encode()) < 255
    fields = split_as_the_old_visualiser_did(old.file_name)
    assert fields == {
        "counter": 7, "layer_type": old.layer_type, "layer": old.layer, "operation": phase,
        "quant_type": old.quant_type, "tensor": old.tensor,
    }  # fmt: skip
    assert parse(old.file_name) is not None


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        ("0001_attention_L0_forward_hifp8_query", "layers.0.attn.core/forward/query"),
        ("0001_attention_L0_forward_hifp8_output", "layers.0.attn.core/forward/context"),
        ("0001_attention_L0_backward_hifp8_input", "layers.0.attn.core/backward/grad_context"),
        ("0001_attention_L0_backward_hifp8_grad-key", "layers.0.attn.core/backward/grad_key"),
        ("0001_attention_forward_hifp8_query", "attention/forward/query"),
        ("0001_linear_L1_forward_bf16_weight", "layers.1.linear/forward/weight"),
        ("0001_linear_L1_backward_bf16_input", "layers.1.linear/backward/grad_output"),
        ("0001_linear_L1_backward_bf16_grad_output", "layers.1.linear/backward/grad_output"),
        ("0001_linear_L1_backward_bf16_output", "layers.1.linear/backward/grad_input"),
        ("0001_linear_L1_backward_bf16_grad_input", "layers.1.linear/backward/grad_input"),
        ("0001_linear_L1_backward_bf16_weight", "layers.1.linear/backward/weight"),
        ("0001_inputnorm_L2_forward_bf16_output", "layers.2.input_norm/forward/output"),
        ("0001_layer_L2_forward_bf16_input-1", "layers.2/forward/input.1"),
        ("0001_finalnorm_forward_bf16_output", "final_norm/forward/output"),
        ("0001_linear_forward_bf16_output", "linear/forward/output"),
    ],
)
def test_a_name_alone_tells_this_much_and_no_more(file_name, name):
    assert str(canonical(parse(f"{MOMENT}_{file_name}.pt"))) == name


def test_the_longer_names_of_later_versions_are_read():
    short = "20250908_095220_0003_attention_L0_forward_pre_FA_mxfp8_value.pt"
    assert parse(short).quant_type == "mxfp8"
    assert str(canonical(parse(short))) == "layers.0.attn.core/forward/value"
    long = parse(
        "20250908_095220_0007_iter002_linear_L1_backward_post_linear_bf16"
        "_rank03_sample001_group000_output.pt"
    )
    assert str(canonical(long)) == "layers.1.linear/backward/grad_input"
    assert (long.step, long.rank, long.microbatch) == (2, 3, 1)


@pytest.mark.parametrize(
    "file_name",
    ["weights.pt", "20250908_0001_linear_L1_forward_bf16_x.pt", f"{MOMENT}_0001_linear_L1.pt"],
)
def test_other_names_are_not_guessed_at(file_name):
    assert parse(file_name) is None
