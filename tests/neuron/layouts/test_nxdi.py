"""The layout `nxdi`: folders that NxD Inference's capture hook wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.neuron.layouts.commands import Command, padded, small_llama
from tests.neuron.layouts.writers import FakeNxdiHook, hook_hf_eagerly

import tensortap
from tensortap.errors import ConfigError, NotSupported
from tensortap.layouts import Layout, layout
from tensortap.sinks import MemorySink

MODULES = ["embed_tokens", "layers.0", "layers.0.self_attn.o_proj", "layers.1", "norm"]
PROMPT = torch.tensor([[5, 9, 33, 12, 7]])
BUCKET = 16


def generate(model: Any, tokens: int = 3, prompt: torch.Tensor = PROMPT) -> None:
    with torch.no_grad():
        model.generate(
            prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=63
        )


def captured(
    model: Any, folder: Path, modules: list[str] = MODULES, **options: Any
) -> FakeNxdiHook:
    """What the hook is given when the model runs traced: outputs in a bucket, right-padded."""
    hook = FakeNxdiHook(folder, modules, **options)
    seen: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        name = path.removeprefix("model.")
        if name in modules:

            def keep(_m: object, _a: object, output: Any, name: str = name) -> None:
                found = output[0] if isinstance(output, tuple) else output
                seen[name] = padded(found, BUCKET, 1) if found.shape[1] > 1 else found.clone()

            module.register_forward_hook(keep)
    model.register_forward_hook(lambda *_: hook(seen))
    return hook


def add(folder: Path, **extra: Any) -> None:
    """Keys that the user adds to the hook's metadata."""
    path = folder / "capture_metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))


def run_of(model: Any, path: Path) -> Path:
    with tensortap.attach(model, path, values="full", phases=("forward",)):
        generate(model)
    return path


def load(folder: Path) -> MemorySink:
    sink = MemorySink()
    layout("nxdi").load(folder, sink, lambda done: None)
    return sink


def test_it_is_a_layout_that_is_only_imported(tmp_path: Path) -> None:
    found: Layout = layout("nxdi")
    assert found.name == "nxdi"
    with pytest.raises(NotSupported, match="only imported"):
        found.export(None, tmp_path, "*", lambda done: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'nxdi' \(only imported\)"):
        layout("nxdy")


def test_a_capture_compares_equal_to_the_same_model_captured_here(
    tmp_path: Path, tt: Command
) -> None:
    reference = run_of(small_llama(), tmp_path / "reference")
    model = small_llama()
    captured(model, tmp_path / "nxdi")
    generate(model)
    add(tmp_path / "nxdi", lengths=[PROMPT.shape[1]])
    code, moved, _ = tt(
        "import", tmp_path / "nxdi", "--layout", "nxdi", "--out", tmp_path / "run", "--json"
    )
    assert (code, moved["records"], moved["skipped"]) == (0, 3 * len(MODULES), [])
    code, found, _ = tt(
        "compare",
        reference,
        tmp_path / "run",
        "--json",
        "--select",
        "embed/*,layers.?/*,layers.0.attn.out/*,final_norm/*,!*/input*",
    )
    [pairs] = found["runs"]
    assert (code, found["verdict"]) == (0, "agree")
    assert (pairs["compared"], pairs["not_compared"]) == (15, 0)


def test_a_fault_of_one_layer_is_found_in_the_imported_capture(tmp_path: Path, tt: Command) -> None:
    reference = run_of(small_llama(), tmp_path / "reference")
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1.0
    captured(model, tmp_path / "nxdi", ["layers.0", "layers.1"])
    generate(model)
    add(tmp_path / "nxdi", lengths=[5])
    code, found, _ = tt(
        "compare", reference, tmp_path / "nxdi", "--json", "--select", "layers.?/*/output"
    )
    assert code == 1
    assert found["runs"][0]["first_divergence"]["tensor"] == "layers.1/forward/output"


def test_padding_stays_when_nobody_says_how_long_the_prompt_is(tmp_path: Path, tt: Command) -> None:
    model = small_llama()
    captured(model, tmp_path / "nxdi", ["layers.0"])
    generate(model, 1)
    assert tt("import", tmp_path / "nxdi", "--layout", "nxdi", "--out", tmp_path / "run")[0] == 0
    code, found, _ = tt("coverage", tmp_path / "run", "--json")
    assert code == 0
    assert ['add "lengths"' in note["reason"] for note in found["notes"]] == [True]
    with tensortap.open_run(tmp_path / "run") as run:
        assert run.tensor("layers.0/forward/output", padded=False).shape == (1, BUCKET, 32)


def test_several_prompts_of_one_application_are_steps(tmp_path: Path, tt: Command) -> None:
    """NxDI goes on counting, and calls the second prompt token generation."""
    reference = small_llama()
    with tensortap.attach(reference, tmp_path / "reference", select="layers.?", values="full"):
        generate(reference)
        generate(reference, prompt=PROMPT[:, 1:])
    model = small_llama()
    captured(model, tmp_path / "nxdi", ["layers.0", "layers.1"])
    generate(model)
    generate(model, prompt=PROMPT[:, 1:])
    add(tmp_path / "nxdi", lengths=[[5], [4]])
    words = ["--json", "--select", "layers.?/forward/output"]
    code, found, _ = tt("compare", tmp_path / "reference", tmp_path / "nxdi", *words)
    assert (code, found["verdict"]) == (0, "agree")
    assert (found["runs"][0]["compared"], found["runs"][0]["not_compared"]) == (12, 0)
    assert "forwards 1, 4 have several positions" in str(load(tmp_path / "nxdi").coverage["notes"])


def test_lengths_cut_positions_and_no_other_axis(tmp_path: Path) -> None:
    hook = FakeNxdiHook(
        tmp_path, ["layers.0", "layers.0.mlp.gate", "embed_tokens"], capture_inputs=True
    )
    shapes = {"layers.0": (1, 16, 32), "layers.0.mlp.gate": (16, 8), "embed_tokens": (1, 16, 32)}
    hook(
        {name: torch.rand(shape) for name, shape in shapes.items()},
        {"layers.0": torch.rand(1, 16, 32), "embed_tokens": torch.ones(1, 16, dtype=torch.int32)},
    )
    add(tmp_path, lengths=[6])
    found = {str(r.name): r.placement.valid for r in load(tmp_path).records if r.placement}
    assert found == {
        "embed/forward/input": {1: 6},
        "embed/forward/output": {1: 6},
        "layers.0/forward/input": {1: 6},
        "layers.0/forward/output": {1: 6},
        "layers.0.mlp.router/forward/output": {0: 6},
    }


def test_rows_of_several_lengths_share_the_longest_and_a_note_says_so(tmp_path: Path) -> None:
    FakeNxdiHook(tmp_path, ["layers.0"])({"layers.0": torch.rand(2, 16, 32)})
    add(tmp_path, lengths=[6, 9])
    sink = load(tmp_path)
    assert sink.records[0].placement.valid == {1: 9}
    assert "different lengths" in str(sink.coverage)


def test_stand_ins_of_one_element_are_missing_and_never_data(tmp_path: Path, tt: Command) -> None:
    hook = FakeNxdiHook(tmp_path / "nxdi", ["layers.0", "layers.1"])
    hook({"layers.0": torch.rand(1, 16, 32), "layers.1": torch.rand(1, 16, 32)})
    hook({"layers.0": torch.rand(1, 1, 32)})  # The other bucket does not make layers.1.
    code, moved, _ = tt(
        "import", tmp_path / "nxdi", "--layout", "nxdi", "--out", tmp_path / "run", "--json"
    )
    assert (code, moved["records"]) == (1, 3)
    assert moved["skipped"] == [
        "captured_tensors_tkg_step_2_module_layers.1_output.pt: missing: the file holds a "
        "stand-in, one element for each prompt, because the graph of this bucket does not make "
        "the tensor"
    ]
    code, coverage, _ = tt("coverage", tmp_path / "run", "--json")
    [gap] = coverage["gaps"]
    assert (code, gap["name"]) == (1, "layers.1/forward/output")
    assert gap["reason"].startswith("missing: ")


def test_stand_ins_of_several_prompts_are_missing_too(tmp_path: Path) -> None:
    """Prompts that are encoded one by one: NxDI puts their tensors together, stand-ins as well."""
    hook = FakeNxdiHook(tmp_path, ["layers.0", "layers.1"], manual=2)
    zeros, nan = torch.zeros(4, dtype=torch.bfloat16), torch.full((4,), float("nan"))
    hook({"layers.0": torch.rand(4, 16, 32), "layers.1": zeros}, manual=[torch.rand(4), nan])
    sink = load(tmp_path)
    assert sink.names() == ["layers.0/forward/output", "manual.0/forward/output"]
    gaps = {gap["name"]: gap["reason"] for gap in sink.coverage["gaps"]}
    assert set(gaps) == {"layers.1/forward/output", "manual.1/forward/output"}
    assert "one element for each prompt" in gaps["layers.1/forward/output"]


@pytest.mark.parametrize("lengths", [[17], [5, 5, 5]])
def test_lengths_that_do_not_fit_the_bucket_are_said_and_cut_nothing(
    tmp_path: Path, lengths: list[int]
) -> None:
    FakeNxdiHook(tmp_path, ["layers.0"])({"layers.0": torch.rand(2, 16, 32)})
    add(tmp_path, lengths=lengths)
    sink = load(tmp_path)
    assert sink.records[0].placement is None
    assert f"the lengths {lengths} do not fit forward 1, of 2 rows" in str(sink.coverage["notes"])


def test_inputs_and_manual_tensors_are_imported_and_placeholders_of_nan_are_not(
    tmp_path: Path,
) -> None:
    hook = FakeNxdiHook(tmp_path, ["layers.0"], capture_inputs=True)
    given, made, manual = (torch.rand(1, 4, 32) for _ in range(3))
    hook({"layers.0": made}, {"layers.0": given}, [manual, torch.full((1,), float("nan"))])
    sink = load(tmp_path)
    assert sink.names() == [
        "layers.0/forward/input",
        "layers.0/forward/output",
        "manual.0/forward/output",
    ]
    for name, wanted in zip(sink.names(), (given, made, manual), strict=True):
        [(_, values)] = sink.find(name)
        assert torch.equal(values, wanted)
    assert [record.name.tensor for record in sink.records[:2]] == ["input", "output"]
    assert "manual.1/forward/output" in str(sink.coverage["gaps"])


def test_shards_of_rank_0_have_no_known_place_unless_there_is_one_rank(tmp_path: Path) -> None:
    modules = [
        "layers.0.self_attn.qkv_proj.q_proj",
        "layers.0.mlp.gate_proj",
        "lm_head",
        "layers.0",
    ]
    FakeNxdiHook(tmp_path, modules)({name: torch.rand(1, 4, 8) for name in modules})
    unknown = {
        str(r.name): bool(r.placement and r.placement.unknown) for r in load(tmp_path).records
    }
    assert unknown == {
        "layers.0.attn.q/forward/output": True,
        "layers.0.mlp.gate/forward/output": True,
        "layers.0/forward/output": False,
        "lm_head/forward/output": True,
    }
    add(tmp_path, tp_degree=1)
    assert not any(record.placement for record in load(tmp_path).records)


def test_what_nxdi_returns_of_attention_is_not_taken_for_its_output(tmp_path: Path) -> None:
    seen = {"layers.0": torch.rand(1, 4, 32), "layers.0.self_attn": torch.rand(1, 4, 8)}
    FakeNxdiHook(tmp_path, list(seen))(seen)
    sink = load(tmp_path)
    assert sink.names() == ["layers.0.attn/forward/output.first", "layers.0/forward/output"]
    assert "cos_cache" in str(sink.coverage["notes"])


def test_the_eager_reference_that_nxd_captures_is_read_by_names(tmp_path: Path) -> None:
    model = small_llama()
    hook_hf_eagerly(model, ["layers.0", "layers.0.self_attn", "norm"], tmp_path)
    with torch.no_grad():
        model(PROMPT)
    sink = load(tmp_path)
    assert {"layers.0/forward/output", "final_norm/forward/output"} <= set(sink.names())
    assert "layers.0.attn/forward/input.hidden_states" in sink.names()
    assert "layers.0.attn/forward/output" in sink.names()  # `…_output_0.pt`
    assert sink.coverage["gaps"] == []
    fresh = small_llama().model
    with torch.no_grad():
        wanted = fresh(PROMPT).last_hidden_state
    assert torch.equal(sink.find("final_norm/forward/output")[0][1], wanted)


def test_the_metadata_says_where_the_name_of_a_module_ends(tmp_path: Path) -> None:
    FakeNxdiHook(tmp_path, ["layers.0.my_output_norm", "a b,c"])(
        {"layers.0.my_output_norm": torch.rand(1, 2, 4), "a b,c": torch.rand(1, 2, 4)}
    )
    assert load(tmp_path).names() == [
        "a%20b%2Cc/forward/output",
        "layers.0.my_output_norm/forward/output",
    ]


def test_records_follow_the_order_in_which_modules_run(tmp_path: Path) -> None:
    modules = [
        "lm_head",
        "norm",
        "layers.10",
        "layers.2",
        "layers.2.self_attn.o_proj",
        "embed_tokens",
    ]
    FakeNxdiHook(tmp_path, modules)({name: torch.rand(1, 2, 4) for name in modules})
    assert [record.name.module for record in load(tmp_path).records] == [
        "embed", "layers.2.attn.out", "layers.2", "layers.10", "final_norm", "lm_head",
    ]  # fmt: skip


class Touches:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def broken_folder(folder: Path) -> Path:
    """A capture of layers 0 to 4, all but the last damaged in some way."""
    modules = [f"layers.{n}" for n in range(5)]
    FakeNxdiHook(folder, modules)({name: torch.rand(1, 4, 8) for name in modules})
    paths = [folder / f"captured_tensors_cte_step_1_module_{name}_output.pt" for name in modules]
    paths[0].write_bytes(paths[0].read_bytes()[:300])
    torch.save(Touches(folder / "touched"), paths[1])
    torch.save({"a": 1}, paths[2])
    paths[3].unlink()
    os.mkfifo(paths[3])
    return folder


def test_a_broken_file_does_not_lose_the_rest(tmp_path: Path, tt: Command) -> None:
    folder = broken_folder(tmp_path / "nxdi")
    code, moved, _ = tt("import", folder, "--layout", "nxdi", "--out", tmp_path / "run", "--json")
    assert (code, moved["records"], len(moved["skipped"])) == (1, 1, 4)
    for layer, reason in enumerate(
        ["cannot be read", "code in a file is never run", "not a tensor", "not a regular file"]
    ):
        assert moved["skipped"][layer].startswith(
            f"captured_tensors_cte_step_1_module_layers.{layer}_"
        )
        assert reason in moved["skipped"][layer]
    assert not (folder / "touched").exists()
    with tensortap.open_run(tmp_path / "run") as run:
        assert run.names() == ["layers.4/forward/output"]
        assert not run.complete


def test_nothing_to_import_is_an_error_and_leaves_no_run(tmp_path: Path, tt: Command) -> None:
    folder = broken_folder(tmp_path / "nxdi")
    (folder / "captured_tensors_cte_step_1_module_layers.4_output.pt").unlink()
    code, _, err = tt("import", folder, "--layout", "nxdi", "--out", tmp_path / "run")
    assert code == 2
    assert "holds no tensor that could be read. captured_tensors_cte_step_1_module_layers." in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()
    (tmp_path / "empty").mkdir()
    for where, reason in (("empty", "holds no captured_tensors_"), ("nowhere", "no folder")):
        code, _, err = tt("import", tmp_path / where, "--layout", "nxdi", "--out", tmp_path / "run")
        assert (code, reason in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"tensors": []}', "'tensors' must be an object"),
        ('{"lengths": [0]}', "'lengths' must list the tokens"),
        ('{"lengths": "5"}', "'lengths' must list the tokens"),
        ('{"tp_degree": "2"}', "'tp_degree' must be a number"),
    ],
)
def test_damaged_metadata_is_said_and_names_do_instead(
    tmp_path: Path, text: str, reason: str
) -> None:
    FakeNxdiHook(tmp_path, ["layers.0"])({"layers.0": torch.rand(1, 4, 8)})
    (tmp_path / "capture_metadata.json").write_text(text)
    sink = MemorySink()
    moved = layout("nxdi").load(tmp_path, sink, lambda done: None)
    assert sink.names() == ["layers.0/forward/output"]
    [skipped] = moved.skipped
    assert skipped.startswith("capture_metadata.json: ")
    assert reason in skipped


def test_names_in_the_metadata_open_no_file(tmp_path: Path) -> None:
    FakeNxdiHook(tmp_path / "nxdi", ["layers.0"])({"layers.0": torch.rand(1, 4, 8)})
    torch.save(torch.rand(3), tmp_path / "captured_tensors_secret.pt")
    add(
        tmp_path / "nxdi",
        tensors={"../captured_tensors_secret.pt": {"module_name": "../x", "step": 1}},
    )
    sink = MemorySink()
    moved = layout("nxdi").load(tmp_path / "nxdi", sink, lambda done: None)
    assert sink.names() == ["layers.0/forward/output"]
    assert moved.skipped == (
        "..%2Fcaptured_tensors_secret.pt: capture_metadata.json lists it, and it is not there",
    )


def test_a_huge_metadata_file_is_not_read(tmp_path: Path) -> None:
    FakeNxdiHook(tmp_path, ["layers.0"])({"layers.0": torch.rand(1, 4, 8)})
    with open(tmp_path / "capture_metadata.json", "wb") as file:
        file.truncate(1 << 40)
    moved = layout("nxdi").load(tmp_path, MemorySink(), lambda done: None)
    assert "cannot be right" in moved.skipped[0]
