"""What can be wrong with what a compiled model hands out, and what a run says of it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from tests.neuron.traced import fake_nxdi
from tests.neuron.traced.fake_llama import FakeNeuronLlama, huggingface

import tensortap
from tensortap.errors import (
    CaptureError,
    CaptureWarning,
    ConfigError,
    RunError,
    RunExists,
    SelectionError,
)
from tensortap_analysis import compare
from tensortap_neuron import traced

IDS = torch.tensor([[3, 1, 4, 1, 5]])
MASK = torch.ones_like(IDS)
POSITIONS = torch.arange(5)[None]
PROMPT = [IDS, MASK, POSITIONS, torch.arange(1), None]
TOKEN = [
    IDS[:, :1],
    torch.ones(1, 6, dtype=torch.int64),
    torch.tensor([[5]]),
    torch.arange(1),
    None,
]


def prepared(*modules, **more):
    """A capture of the outputs of these modules of a Llama of two layers; by default of all."""
    select = ",".join(f"{name}/forward/output" for name in modules) or traced.EVERY_LAYER
    config = SimpleNamespace(num_hidden_layers=2, model_type="llama")
    return traced.prepare(config, select, **more)


def app(**options):
    return SimpleNamespace(
        neuron_config=fake_nxdi.NeuronConfig(on_device_sampling_config=object(), **options)
    )


def handed_out(capture, inputs=PROMPT, values=None, width=8, **options):
    """One forward through the hook by hand; returns what it wrote."""
    sink = tensortap.MemorySink()
    hook = capture.hook(sink, on_error="raise")
    if values is None:
        values = [torch.rand(1, width, 4) for _ in capture.modules]
    if inputs is not None:
        hook.inputs(app(**options), inputs)
    hook(app(**options), values)
    hook.close()
    return sink


def reasons(sink, kind="gaps"):
    return {row["name"]: row["reason"] for row in sink.coverage[kind]}


def test_a_module_missing_from_one_bucket_is_a_gap_there_and_recorded_elsewhere(
    monkeypatch, tmp_path
):
    model = huggingface()
    kind = fake_nxdi.install(monkeypatch, model)
    monkeypatch.setattr(kind, "holes", {16: "layers.1"})
    model.config.save_pretrained(tmp_path / "model")
    started = traced.application(tmp_path / "model", tmp_path / "compiled")
    sink = tensortap.MemorySink()
    with started.capture.hook(sink) as hook:
        started.generate(IDS, hook)
        started.generate(torch.arange(12)[None], hook)
    assert [r.at.step for r, _ in sink.find("layers.1/forward/output")] == [0]
    assert [r.at.step for r, _ in sink.find("layers.0/forward/output")] == [0, 1]
    assert not sink.coverage["complete"]
    reason = reasons(sink)["layers.1/forward/output"]
    assert reason.startswith("missing: a stand-in came back")
    assert "cte, bucket 16" in reason


def test_a_tensor_that_is_not_registered_is_a_gap_and_no_other_takes_its_place():
    capture = prepared("embed", manual=["a/forward/x", "b/forward/x"])
    nan = torch.full((1,), float("nan"))
    sink = handed_out(capture, values=[torch.rand(1, 8, 4), torch.rand(3, 3), nan])
    assert sink.names() == ["embed/forward/output"]
    assert "1 of 2 registered tensors came" in reasons(sink)["b/forward/x"]
    sink = handed_out(capture, values=[torch.rand(1, 8, 4), nan, nan])
    assert "register_tensor was not called" in reasons(sink)["a/forward/x"]
    sink = handed_out(capture, values=[torch.rand(1, 8, 4), torch.zeros(3), torch.ones(3)])
    assert sink.find("b/forward/x")[0][1].tolist() == [1, 1, 1]


def test_the_experts_of_each_layer_are_taken_apart():
    capture = prepared("embed", moe=True, manual=["a/forward/x"])
    stacked = torch.arange(12).view(2, 3, 2)
    nan = torch.full((1,), float("nan"))
    sink = handed_out(capture, values=[torch.rand(1, 8, 4), torch.rand(2), stacked, nan])
    assert torch.equal(sink.find("layers.1.mlp.router/forward/expert_index")[0][1], stacked[1])
    assert sink.find("a/forward/x")[0][1].shape == (2,)


def test_what_cannot_be_brought_to_the_cpu_is_a_gap_with_its_cause():
    values = [torch.rand(1, 8, 4), torch.empty(1, 8, 4, device="meta")]
    sink = handed_out(prepared("embed", "layers.0"), values=values)
    reason = reasons(sink)["layers.0/forward/output"]
    assert "could not be brought to the CPU" in reason
    assert "NotImplementedError" in reason
    assert "embed/forward/output" in sink.names()


def test_what_comes_back_in_pieces_of_ranks_is_a_gap():
    sink = handed_out(
        prepared("embed", "final_norm"), values=[torch.rand(1, 8, 4), [[torch.rand(2)]]]
    )
    assert "came back as list" in reasons(sink)["final_norm/forward/output"]


def test_a_layer_without_its_residual_is_not_called_its_output(monkeypatch, tmp_path):
    model = huggingface()
    fake_nxdi.install(monkeypatch, model)
    model.config.save_pretrained(tmp_path / "model")
    with tensortap.attach(model, tmp_path / "hf", select=traced.EVERY_LAYER, values="full"):
        model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    kernels = {"qkv_kernel_enabled": True, "qkv_kernel_fuse_residual_add": True}
    started = traced.application(tmp_path / "model", tmp_path / "c", neuron=kernels)
    with started.capture.hook(tmp_path / "neuron") as hook:
        started.generate(IDS, hook, max_new_tokens=2)
    run = tensortap.open_run(tmp_path / "neuron")
    at = [(r.at.microbatch, r.name.tensor) for r in run.records(select="layers.1")]
    assert at == [(0, "output_without_residual"), (1, "output")]
    theirs = tensortap.open_run(tmp_path / "hf").tensor("layers.1/forward/output", microbatch=0)
    ours = run.tensor("layers.1/forward/output_without_residual", microbatch=0)
    assert (theirs - ours).abs().max() > 1e-3
    assert compare(tmp_path / "hf", tmp_path / "neuron").first_divergence is None


@pytest.mark.parametrize(
    ("kernels", "own"),
    [
        ((), {}),
        (("qkv_kernel_enabled",), {"layers.1.attn": "input_before_norm"}),
        (("mlp_kernel_enabled",), {"layers.1.mlp": "input_before_norm"}),
        (("mlp_kernel_enabled", "mlp_kernel_fuse_residual_add"),
         {"layers.1.mlp": "input_without_residual"}),
        (("qkv_kernel_enabled", "qkv_kernel_fuse_residual_add"),
         {"layers.1": "input_without_residual", "layers.1.attn": "input_without_residual"}),
    ],
)  # fmt: skip
def test_inputs_that_fused_kernels_change_have_names_of_their_own(
    monkeypatch, tmp_path, kernels, own
):
    """Whatever is called `input` is what goes into that module of transformers."""
    model = huggingface()
    fake_nxdi.install(monkeypatch, model)
    model.config.save_pretrained(tmp_path / "model")
    select = "layers.1/forward/input,layers.1.attn/forward/input,layers.1.mlp/forward/input"
    theirs, ours = tensortap.MemorySink(), tensortap.MemorySink()
    with tensortap.attach(model, theirs, select=select, values="full"):
        model(IDS)
    flags = dict.fromkeys(kernels, True)
    started = traced.application(tmp_path / "model", tmp_path / "c", select=select, neuron=flags)
    with started.capture.hook(ours) as hook:
        started.generate(IDS, hook)
    modules = ("layers.1", "layers.1.attn", "layers.1.mlp")
    assert set(ours.names()) == {f"{name}/forward/{own.get(name, 'input')}" for name in modules}
    for name in modules:
        [(_, right)] = theirs.find(f"{name}/forward/input")
        [(_, found)] = ours.find(f"{name}/forward/{own.get(name, 'input')}")
        assert torch.allclose(found, right, rtol=1e-5, atol=1e-6) == (name not in own)


def test_norms_that_a_model_type_never_fuses_leave_the_names_alone():
    kernels = {"qkv_kernel_enabled": True, "mlp_kernel_enabled": True}
    config = SimpleNamespace(num_hidden_layers=2, model_type="mistral")
    capture = traced.prepare(config, "layers.1.mlp/forward/input,layers.1.attn/forward/input")
    sink = handed_out(capture, values=[torch.rand(1, 8, 4)] * 4, **kernels)
    assert sink.names() == ["layers.1.attn/forward/input", "layers.1.mlp/forward/input"]


def test_a_sequence_split_over_ranks_keeps_the_norms_out_of_the_kernels_while_it_is():
    kernels = {"qkv_kernel_enabled": True, "sequence_parallel_enabled": True, "tp_degree": 2}
    capture = prepared_input("layers.1.attn")
    values = [torch.rand(1, 4, 4)] * 2
    assert handed_out(capture, values=values, **kernels).names() == ["layers.1.attn/forward/input"]
    values = [torch.rand(1, 1, 4)] * 2
    assert handed_out(capture, TOKEN, values, **kernels).names() == [
        "layers.1.attn/forward/input_before_norm"
    ]


def prepared_input(name):
    config = SimpleNamespace(num_hidden_layers=2, model_type="llama")
    return traced.prepare(config, f"{name}/forward/input")


def test_what_attention_hands_out_first_by_the_alphabet_is_not_its_output(monkeypatch, tmp_path):
    """`cos_cache` comes before `hidden_states` among the fields of what attention returns."""
    model = huggingface()
    kind = fake_nxdi.install(monkeypatch, model)
    model.config.save_pretrained(tmp_path / "model")
    paths = ["layers.0.self_attn", "layers.0.self_attn.o_proj"]
    config = SimpleNamespace(num_hidden_layers=3, model_type="own", hidden_size=32)
    capture = traced.prepare(config, "layers.0.*", modules=paths)
    neuron = fake_nxdi.NeuronConfig(
        on_device_sampling_config=object(), tensor_capture_config=capture.tensor_capture_config()
    )
    load = fake_nxdi.load_pretrained_config(str(tmp_path / "model"))
    running = kind("", fake_nxdi.LlamaInferenceConfig(neuron, load))
    running.start(running._model())
    sink = tensortap.MemorySink()
    with capture.hook(sink) as hook:
        running.forward(*PROMPT[:3], **hook.kwargs)
    assert "layers.0.attn/forward/output" not in sink.names()
    assert "(1, 8, 8) came back" in reasons(sink)["layers.0.attn/forward/output"]
    assert "attn.out" in reasons(sink)["layers.0.attn/forward/output"]
    theirs = tensortap.MemorySink()
    with tensortap.attach(model, theirs, select="layers.0.attn/forward/output", values="full"):
        model(IDS)
    [(_, wanted)] = theirs.find("layers.0.attn/forward/output")
    [(record, found)] = sink.find("layers.0.attn.out/forward/output")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert record.dims == "batch seq hidden"


def test_an_attention_that_returns_what_is_as_wide_as_the_model_has_its_output():
    config = SimpleNamespace(num_hidden_layers=1, model_type="own", hidden_size=4)
    select = "layers.0.attn/forward/output,embed/forward/output"
    modules = ["embed_tokens", "layers.0.self_attn"]
    capture = traced.prepare(config, select, modules=modules)
    for width, written in ((4, True), (2, False)):
        sink = handed_out(capture, values=[torch.rand(1, 8, 4), torch.rand(1, 8, width)])
        assert ("layers.0.attn/forward/output" in sink.names()) == written


def test_prompts_that_are_encoded_one_by_one_are_rows_of_one_forward(monkeypatch, tmp_path):
    model = huggingface()
    kind = fake_nxdi.install(monkeypatch, model)
    monkeypatch.setattr(kind, "holes", {8: "layers.1"})
    model.config.save_pretrained(tmp_path / "model")
    options = {"ctx_batch_size": 1, "is_continuous_batching": True}
    started = traced.application(tmp_path / "model", tmp_path / "c", neuron=options)
    ours, theirs = tensortap.MemorySink(), tensortap.MemorySink()
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2], [1, 4, 1, 4, 2]])
    with started.capture.hook(ours) as hook:
        started.generate(ids, hook)
    with tensortap.attach(model, theirs, select="layers.2/forward/output", values="full"):
        model(ids)
    [(_, wanted)] = theirs.find("layers.2/forward/output")
    [(_, found)] = ours.find("layers.2/forward/output")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert "layers.1/forward/output" not in ours.names()
    assert "module was not called" in reasons(ours)["layers.1/forward/output"]


@pytest.mark.parametrize("rows", [1, 4])
def test_stand_ins_of_prompts_that_were_encoded_one_by_one_are_no_tensors(rows):
    """ModelWrapper.forward puts the outputs of its batches together, stand-ins as well."""
    capture = prepared("layers.0", "layers.1", manual=["layers.0.attn/forward/probs"])
    nan = torch.full((rows,), float("nan"), dtype=torch.bfloat16)
    inputs = [IDS.repeat(rows, 1), MASK.repeat(rows, 1), POSITIONS.repeat(rows, 1), None, None]
    sink = handed_out(
        capture, inputs, [torch.rand(rows, 8, 4), torch.zeros(rows, dtype=torch.bfloat16), nan]
    )
    assert sink.names() == ["layers.0/forward/output"]
    assert "module was not called" in reasons(sink)["layers.1/forward/output"]
    assert "register_tensor was not called" in reasons(sink)["layers.0.attn/forward/probs"]


def test_rank_zeros_piece_of_the_vocabulary_is_placed_as_one():
    sink = handed_out(prepared("lm_head"), values=[torch.rand(1, 1, 15)], tp_degree=4)
    [(record, _)] = sink.find("lm_head/forward/output")
    assert record.placement.logical_shape == (1, 1, 60)
    assert record.placement.segments == {2: ((0, 15),)}


def test_a_run_that_holds_a_piece_says_what_is_missing(tmp_path):
    capture = prepared("lm_head")
    with capture.hook(tmp_path / "run") as hook:
        hook.inputs(app(tp_degree=4), PROMPT)
        hook(app(tp_degree=4), [torch.rand(1, 1, 15)])
    run = tensortap.open_run(tmp_path / "run")
    with pytest.raises(RunError, match="nothing was captured of"):
        run.tensor("lm_head/forward/output")
    assert run.tensor("lm_head/forward/output", rank=0).shape == (1, 1, 15)


def test_a_module_nobody_knows_is_unknown_on_several_ranks_and_whole_on_one():
    capture = prepared("layers.0.x", modules=["layers.0.x"])
    [(record, _)] = handed_out(capture, tp_degree=4).find("layers.0.x/forward/output")
    assert record.placement.unknown
    [(record, _)] = handed_out(capture).find("layers.0.x/forward/output")
    assert not record.placement.unknown


def test_a_split_sequence_is_a_piece_of_the_prompt_but_whole_for_a_token():
    options = {"tp_degree": 4, "sequence_parallel_enabled": True}
    capture = prepared("layers.0")
    [(record, _)] = handed_out(capture, width=2, **options).find("layers.0/forward/output")
    assert record.placement.logical_shape == (1, 8, 4)
    assert record.placement.segments == {1: ((0, 2),)}
    assert record.placement.valid == {1: 5}
    [(record, _)] = handed_out(capture, width=8, **options).find("layers.0/forward/output")
    assert record.shape == (1, 5, 4)  # Rank 0 has all that is no padding.
    [(record, _)] = handed_out(capture, TOKEN, width=1, **options).find("layers.0/forward/output")
    assert record.placement is None
    [(record, _)] = handed_out(capture, width=2, cp_degree=2, **options).find(
        "layers.0/forward/output"
    )
    assert record.placement.unknown  # The sequence may have been reordered before.


def test_a_chunk_of_a_prompt_belongs_to_the_step_of_the_prompt():
    sink = tensortap.MemorySink()
    with prepared("layers.0").hook(sink) as hook:
        for start in (0, 5, 10, 0):
            hook.inputs(app(), [IDS, MASK, POSITIONS + start, torch.arange(1), None])
            hook(app(), [torch.rand(1, 8, 4)])
    assert [(r.at.step, r.at.microbatch, r.shape[1]) for r in sink.records] == [
        (0, 0, 5), (0, 1, 8), (0, 2, 8), (1, 0, 5)
    ]  # fmt: skip
    assert "encoded in chunks" in reasons(sink, "notes")["root"]


def test_without_the_inputs_padding_is_kept_and_the_run_says_so():
    sink = handed_out(prepared(), inputs=None)
    assert sink.find("layers.0/forward/output")[0][0].shape == (1, 8, 4)
    assert "input_capture_hook=hook.inputs" in reasons(sink, "notes")["root"]


def test_rows_of_different_lengths_are_cut_to_the_longest_and_named():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    inputs = [IDS.repeat(2, 1), mask, positions, torch.arange(2), None]
    values = [torch.rand(2, 8, 4) for _ in range(5)]
    sink = handed_out(prepared(), inputs, values)
    assert sink.find("layers.0/forward/output")[0][0].shape == (2, 4, 4)
    assert "rows of 3, 4 tokens" in reasons(sink, "notes")["root"]


def test_padding_on_the_left_is_not_cut():
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    sink = handed_out(prepared(), [IDS, mask, positions, torch.arange(1), None])
    assert sink.find("layers.0/forward/output")[0][0].shape == (1, 8, 4)
    assert "padded on the left" in reasons(sink, "notes")["root"]


def test_an_axis_of_experts_or_heads_is_not_taken_for_the_sequence():
    paths = ["embed_tokens", "layers.0.r", "layers.0.h"]
    capture = prepared("embed", "layers.0.r", "layers.0.h", modules=paths)
    values = [torch.rand(1, 8, 4), torch.rand(8, 16), torch.rand(1, 12, 8, 3)]
    sink = handed_out(capture, values=values)
    assert sink.find("layers.0.r/forward/output")[0][0].shape == (8, 16)
    heads = sink.find("layers.0.h/forward/output")[0][0]
    assert heads.shape == (1, 12, 8, 3)
    assert heads.placement.unknown
    assert "nothing says which" in reasons(sink, "notes")["layers.0.h/forward/output"]


def test_of_tensors_by_hand_nobody_knows_which_piece_rank_zero_has():
    capture = prepared("layers.0", moe=True, manual=["layers.0.attn/forward/probs"])
    values = [torch.rand(1, 8, 4), torch.rand(1, 1, 3, 3), torch.zeros(2, 3, 2)]
    sink = handed_out(capture, values=values, tp_degree=4)
    probs, index = "layers.0.attn/forward/probs", "layers.0.mlp.router/forward/expert_index"
    for name in (probs, index):
        assert sink.find(name)[0][0].placement.unknown
        assert handed_out(capture, values=values).find(name)[0][0].placement is None


def test_padding_of_tensors_by_hand_is_cut_or_said():
    capture = prepared("layers.0", moe=True, manual=["a/forward/x", "b/forward/probs"])
    values = [torch.rand(1, 8, 4), torch.rand(1, 8, 3), torch.rand(1, 2, 8, 8)]
    sink = handed_out(capture, values=[*values, torch.zeros(2, 8, 2)])
    [(record, payload)] = sink.find("a/forward/x")
    assert torch.equal(payload, values[1][:, :5])
    assert record.placement.valid == {1: 5}
    for name in ("b/forward/probs", "layers.1.mlp.router/forward/expert_index"):
        assert sink.find(name)[0][0].placement.unknown
        assert "padded to the bucket" in reasons(sink, "notes")[name]


def test_what_is_summed_over_ranks_is_whole():
    paths = ["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"]
    capture = prepared("layers.0.attn.out", "layers.0.mlp.down", modules=paths)
    for options, segments in (({}, None), ({"sequence_parallel_enabled": True}, {1: ((0, 2),)})):
        width = 2 if options else 8
        for record in handed_out(capture, width=width, tp_degree=4, **options).records:
            assert not record.placement.unknown
            assert (record.placement.segments or None) == segments


def test_with_context_parallelism_the_input_of_attention_is_not_its_output():
    """`attn_input_hidden_states` comes first by the alphabet, and is as wide as the model."""
    config = SimpleNamespace(num_hidden_layers=1, model_type="llama4", hidden_size=4)
    select = "layers.0.attn/forward/output,embed/forward/output"
    capture = traced.prepare(config, select, modules=["embed_tokens", "layers.0.self_attn"])
    sink = handed_out(capture, cp_degree=2, tp_degree=2)
    assert "layers.0.attn/forward/output" in reasons(sink)


def test_tokens_of_interleaved_requests_are_said():
    sink = tensortap.MemorySink()
    with prepared("layers.0").hook(sink) as hook:
        for request, (inputs, length) in ((0, (PROMPT, 8)), (1, (PROMPT, 8)), (0, (TOKEN, 1))):
            hook.inputs(app(), [*inputs[:3], torch.tensor([request]), None])
            hook(app(), [torch.rand(1, length, 4)])
    assert "requests are interleaved" in reasons(sink, "notes")["root"]
    assert [record.native for record in sink.records][-1] == "layers.0 (tkg)"


def test_a_model_compiled_with_another_capture_stops_the_capture_and_nothing_else():
    hook = prepared().hook(tensortap.MemorySink())
    with pytest.warns(CaptureWarning, match="handed out 2 tensors where this capture asks for 5"):
        hook(app(), [torch.rand(1, 8, 4)] * 2)
    hook(app(), [torch.rand(1, 8, 4)] * 5)
    hook.close()
    assert not hook.coverage.report(steps=0)["complete"]
    assert hook.coverage.total == 0


def test_one_more_place_is_what_nxdi_makes_of_a_configuration_it_reloads():
    """TensorCaptureConfig adds its place for experts again each time it is made from JSON."""
    capture = prepared("embed", moe=True)
    once = fake_nxdi.TensorCaptureConfig(**capture.nxdi_options())
    again = fake_nxdi.TensorCaptureConfig(**vars(once))
    assert again.get_offset() == once.get_offset() + 1
    nan = torch.full((1,), float("nan"))
    values = [torch.rand(1, 8, 4), torch.zeros(2, 5, 1), *[nan] * (again.get_offset() - 2)]
    assert "layers.0.mlp.router/forward/expert_index" in handed_out(capture, values=values).names()


class FullDisk(tensortap.MemorySink):
    def write(self, record, payload):
        raise CaptureError("Writing failed: no space left.")


def test_a_failing_sink_never_reaches_the_generate_loop(monkeypatch, tmp_path):
    model = huggingface()
    fake_nxdi.install(monkeypatch, model)
    model.config.save_pretrained(tmp_path / "model")
    started = traced.application(tmp_path / "model", tmp_path / "compiled")
    sink = FullDisk()
    with pytest.warns(CaptureWarning, match="stopped capturing, the run is incomplete") as said:
        with started.capture.hook(sink) as hook:
            assert started.generate(IDS, hook, max_new_tokens=3).shape == (1, 8)
    assert len([one for one in said if one.category is CaptureWarning]) == 1
    assert "no space left" in reasons(sink)["*"]
    assert sink.closed
    with pytest.raises(CaptureError, match="no space left"):
        with started.capture.hook(FullDisk(), on_error="raise") as hook:
            started.generate(IDS, hook)


class FullAtTheEnd(tensortap.MemorySink):
    def close(self):
        super().close()
        raise CaptureError("The shard could not be finished.")


def test_a_sink_that_fails_to_close_is_said_like_any_other_failure():
    with pytest.warns(CaptureWarning, match="could not be finished"):
        with prepared("embed").hook(FullAtTheEnd()) as hook:
            hook(app(), [torch.rand(1, 8, 4)])
    with pytest.raises(CaptureError, match="could not be finished"):
        with prepared("embed").hook(FullAtTheEnd(), on_error="raise") as hook:
            hook(app(), [torch.rand(1, 8, 4)])


def test_a_hook_that_never_gets_anything_is_an_error_that_says_why(monkeypatch, tmp_path):
    """`output_logits=True` without sampling on the device drops captures without a word."""
    model = huggingface()
    kind = fake_nxdi.install(monkeypatch, model)
    neuron = fake_nxdi.NeuronConfig(
        output_logits=True,
        tensor_capture_config=fake_nxdi.TensorCaptureConfig(modules_to_capture=["norm"]),
    )
    config = SimpleNamespace(neuron_config=neuron, **model.config.to_dict())
    silent = kind("", config)
    silent.start(FakeNeuronLlama(model.config, neuron).load(model))
    hook = prepared("final_norm").hook(tmp_path / "run")
    silent.forward(*PROMPT[:3], **hook.kwargs)
    with pytest.raises(CaptureError, match="silently when output_logits=True was set"):
        hook.close()
    assert not (tmp_path / "run").exists()
    with pytest.raises(CaptureError, match=r"Pass generate\(\*\*hook.kwargs\)"):
        prepared().hook(tensortap.MemorySink()).close()


def test_only_what_is_selected_of_steps_names_and_values_is_written():
    capture, sink = prepared(), tensortap.MemorySink()
    options = {"steps": "1", "select": "layers.*/forward/output", "values": "stats"}
    with capture.hook(sink, **options) as hook:
        for _ in range(3):
            hook.inputs(app(), PROMPT)
            hook(app(), [torch.rand(1, 8, 4)] * 5)
            hook.inputs(app(), TOKEN)
            hook(app(), [torch.rand(1, 1, 4)] * 5)
    assert sink.names() == ["layers.0/forward/output", "layers.1/forward/output"]
    assert {(r.at.step, r.at.microbatch) for r in sink.records} == {(1, 0), (1, 1)}
    assert sink.payloads == [None] * 4
    assert sink.steps == [1]
    with pytest.raises(CaptureError, match="there were 1 steps"):
        with capture.hook(tensortap.MemorySink(), steps="5") as hook:
            hook(app(), [torch.rand(1, 8, 4)] * 5)


def test_the_bucket_is_known_from_what_is_not_written_too():
    sink = tensortap.MemorySink()
    with prepared("layers.0", "lm_head").hook(sink, select="lm_head/forward/output") as hook:
        hook.inputs(app(), PROMPT)
        hook(app(), [torch.rand(1, 8, 4), torch.rand(1, 1, 9)])
    assert [record.native for record in sink.records] == ["lm_head (cte, bucket 8)"]


def test_a_step_can_be_ended_by_hand():
    sink = tensortap.MemorySink()
    with prepared("lm_head").hook(sink) as hook:
        for _ in range(2):
            hook(app(), [torch.rand(1, 1, 6)])
        hook.step()
        hook(app(), [torch.rand(1, 1, 6)])
    assert [(r.at.step, r.at.microbatch) for r in sink.records] == [(0, 0), (0, 1), (1, 0)]


def test_a_sample_is_every_nth_value(tmp_path):
    values = torch.arange(2 * 8 * 512, dtype=torch.float32).view(1, 8, 1024)
    with prepared("embed").hook(tmp_path / "run", values="sample") as hook:
        hook(app(), [values])
    [record] = tensortap.open_run(tmp_path / "run").records()
    assert (record.shape, record.values, record.stride) == ((1, 8, 1024), "sample", 2)


def test_a_hook_that_selects_nothing_of_its_capture_is_an_error_at_once(tmp_path):
    with pytest.raises(SelectionError, match="matches nothing in this capture"):
        prepared("embed").hook(tmp_path / "run", select="lm_head")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_refused_before_anything_runs(tmp_path):
    with prepared("embed").hook(tmp_path / "run") as hook:
        hook(app(), [torch.rand(1, 8, 4)])
    with pytest.raises(RunExists):
        prepared("embed").hook(tmp_path / "run")
    with pytest.raises(ConfigError, match="no option 'phases'"):
        prepared("embed").hook(tmp_path / "other", phases="backward")


def test_the_run_says_what_was_captured_and_how(tmp_path):
    with prepared("embed").hook(tmp_path / "run", metadata={"prompt": "pi"}) as hook:
        hook(app(), [torch.rand(1, 8, 4)])
    info = tensortap.open_run(tmp_path / "run").info
    assert info.metadata["prompt"] == "pi"
    assert info.metadata["traced"]["modules_to_capture"] == ["embed_tokens"]
    assert info.model_class == "llama"


def test_disabled_it_writes_nothing_and_says_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with prepared("embed").hook(tmp_path / "run", enabled=False) as hook:
            hook(app(), [torch.rand(1, 8, 4)])
    assert not (tmp_path / "run").exists()
