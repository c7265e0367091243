"""The layout `layers-pt`: the layer files of an older guide, to and from runs."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.neuron.layouts.commands import Command, files, padded, small_llama
from tests.neuron.layouts.writers import OldRecorder

import tensortap
from tensortap.layouts import Layout, Moved, layout
from tensortap.sinks import MemorySink
from tensortap.store import RunDirectorySink

IDS = torch.tensor([[5, 9, 33, 12, 7]])
LAYERS = ["embedding", "final_norm", "layer_0", "layer_1"]
NAMES = ["embed", "final_norm", "layers.0", "layers.1"]


def old_folder(folder: Path, model: Any = None, ids: torch.Tensor = IDS, **metadata: Any) -> Path:
    """What the older guide left of one forward."""
    model = model or small_llama()
    recorder = OldRecorder(model)
    with torch.no_grad():
        model(input_ids=ids)
    about = {"prompt": "How are you?", "input_ids": ids, "config": model.config, **metadata}
    return recorder.save(folder, **about)


def attached(
    model: Any, path: Path, texts: list[torch.Tensor] | None = None, **options: Any
) -> Path:
    """A run of the model; each text is a step."""
    about = {"prompt": "How are you?", "token_ids": IDS.tolist(), "compiler_flags": ["-O1"]}
    options = {"values": "full", "metadata": about, **options}
    with tensortap.attach(model, path, **options), torch.no_grad():
        for ids in texts or [IDS]:
            model(input_ids=ids)
    return path


def export(run: Path, out: Path, select: str = "*") -> Moved:
    with tensortap.open_run(run) as opened:
        return layout("layers-pt").export(opened, out, select, lambda done: None)


def load(folder: Path, out: Path) -> Moved:
    return layout("layers-pt").load(folder, RunDirectorySink(out), lambda done: None)


def in_memory(folder: Path) -> tuple[MemorySink, Moved]:
    sink = MemorySink()
    return sink, layout("layers-pt").load(folder, sink, lambda done: None)


def read(path: Path) -> Any:
    """As any script may read it."""
    return torch.load(path, weights_only=True)


def test_it_is_a_layout() -> None:
    found: Layout = layout("layers-pt")
    assert found.name == "layers-pt"


def test_what_the_older_guide_wrote_compares_with_a_run(tmp_path: Path, tt: Command) -> None:
    attached(small_llama(), tmp_path / "run")
    old_folder(tmp_path / "old")
    code, moved, _ = tt(
        "import", tmp_path / "old", "--layout", "layers-pt", "--out", tmp_path / "new", "--json"
    )
    assert (code, moved) == (0, {"records": 4, "files": 4, "skipped": []})
    words = ["--json", "--select", "embed/*/output,layers.?/*/output,final_norm/*/output"]
    for other in ("new", "old"):  # A folder is imported by compare itself.
        code, found, _ = tt("compare", tmp_path / "run", tmp_path / other, *words)
        assert (code, found["verdict"], found["runs"][0]["compared"]) == (0, "agree", 4)


def test_prompt_ids_and_configuration_are_read_without_running_code(tmp_path: Path) -> None:
    model = small_llama()
    old_folder(tmp_path, model, output_logits=torch.rand(1, 5, 64))
    with pytest.raises(pickle.UnpicklingError):  # The configuration is an object.
        read(tmp_path / "metadata.pt")
    sink, moved = in_memory(tmp_path)
    assert moved.skipped == ()
    assert sink.run.metadata == {"prompt": "How are you?", "token_ids": IDS.tolist()}
    assert sink.run.model_config["hidden_size"] == 32
    assert sink.run.model_config["num_hidden_layers"] == 2
    assert sink.coverage["complete"]


class Touches:
    """An object that makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_the_metadata_is_never_run(tmp_path: Path) -> None:
    old_folder(tmp_path / "old", extra=Touches(tmp_path / "touched"))
    sink, _ = in_memory(tmp_path / "old")
    assert not (tmp_path / "touched").exists()
    assert len(sink.records) == 4


@pytest.mark.parametrize("damage", ["cut", "list", "missing", "code"])
def test_layers_are_imported_where_the_metadata_is_damaged(
    tmp_path: Path, tt: Command, damage: str
) -> None:
    path = old_folder(tmp_path / "old") / "metadata.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "code":
        path.write_bytes(pickle.dumps({"config": Touches(tmp_path / "touched")}))
    else:
        path.unlink()
    code, moved, _ = tt(
        "import", tmp_path / "old", "--layout", "layers-pt", "--out", tmp_path / "run", "--json"
    )
    assert (code, moved["records"]) == (0 if damage == "missing" else 1, 4)
    assert tt("coverage", tmp_path / "run")[0] == 1
    assert not (tmp_path / "touched").exists()


def test_a_broken_layer_does_not_lose_the_rest(tmp_path: Path, tt: Command) -> None:
    folder = old_folder(tmp_path / "old")
    (folder / "layer_0_output.pt").write_bytes(b"damaged")
    torch.save((torch.rand(2), None), folder / "embedding_output.pt")
    code, moved, _ = tt(
        "import", folder, "--layout", "layers-pt", "--out", tmp_path / "run", "--json"
    )
    assert (code, moved["records"]) == (1, 2)
    assert [line.partition(":")[0] for line in moved["skipped"]] == [
        "embedding_output.pt", "layer_0_output.pt",
    ]  # fmt: skip
    assert "tuple, not a tensor" in moved["skipped"][0]
    code, coverage, _ = tt("coverage", tmp_path / "run", "--json")
    assert [gap["name"] for gap in coverage["gaps"]] == [
        "embed/forward/output",
        "layers.0/forward/output",
    ]
    (folder / "layer_1_output.pt").unlink()
    (folder / "final_norm_output.pt").write_bytes(b"damaged")
    code, _, err = tt("import", folder, "--layout", "layers-pt", "--out", tmp_path / "other")
    assert (code, "holds no layer that could be read" in err, "Traceback" in err) == (
        2,
        True,
        False,
    )
    assert not (tmp_path / "other").exists()


def test_a_layer_that_the_statistics_list_and_nobody_saved_is_a_gap(tmp_path: Path) -> None:
    folder = old_folder(tmp_path)
    (folder / "layer_1_output.pt").unlink()
    sink, moved = in_memory(folder)
    assert moved.skipped == ()
    [gap] = sink.coverage["gaps"]
    assert gap == {
        "name": "layer_1_output.pt", "reason": "the statistics list it, no file does", "count": 1
    }  # fmt: skip


def test_statistics_may_be_listed_by_the_stem_of_the_file(tmp_path: Path) -> None:
    folder = old_folder(tmp_path)
    statistics = {f"{one}_output": {"mean": 0.0} for one in LAYERS}
    torch.save({"statistics": statistics}, folder / "metadata.pt")
    assert in_memory(folder)[0].coverage["gaps"] == []
    (folder / "layer_1_output.pt").unlink()
    [gap] = in_memory(folder)[0].coverage["gaps"]
    assert gap["name"] == "layer_1_output.pt"


def test_other_folders_are_refused(tmp_path: Path, tt: Command) -> None:
    (tmp_path / "empty").mkdir()
    for where, reason in (
        ("empty", "holds no layer_<i>_output.pt"),
        ("nowhere", "There is no folder"),
    ):
        code, _, err = tt(
            "import", tmp_path / where, "--layout", "layers-pt", "--out", tmp_path / "run"
        )
        assert (code, reason in err) == (2, True)


def test_pads_of_a_bucket_are_not_compared(tmp_path: Path, tt: Command) -> None:
    old_folder(tmp_path / "gpu")
    neuron = old_folder(tmp_path / "neuron", attention_mask=torch.ones_like(IDS))
    for what in LAYERS:
        tensor = read(neuron / f"{what}_output.pt")
        torch.save(padded(tensor, 16, 1), neuron / f"{what}_output.pt")
    code, found, _ = tt("compare", tmp_path / "gpu", tmp_path / "neuron", "--json")
    assert (code, found["verdict"], found["runs"][0]["compared"]) == (0, "agree", 4)


@pytest.mark.parametrize(
    ("mask", "valid", "note"),
    [
        ([[1, 1, 1, 0, 0]], {1: 3}, None),
        ([[1, 1, 1, 1, 1]], None, None),
        ([[0, 0, 1, 1, 1]], None, "padding on the left"),
        ([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], {1: 4}, "longest row"),
    ],
)
def test_the_attention_mask_says_what_is_padding(
    tmp_path: Path, mask: list[list[int]], valid: dict[int, int] | None, note: str | None
) -> None:
    ids = IDS.repeat(len(mask), 1)
    old_folder(tmp_path, ids=ids, attention_mask=torch.tensor(mask))
    sink, _ = in_memory(tmp_path)
    for record in sink.records:
        assert (record.placement.valid if record.placement else None) == valid
    assert [note in row["reason"] for row in sink.coverage["notes"]] == [True] * (note is not None)


def test_two_files_of_one_layer_are_not_two_records_of_it(tmp_path: Path) -> None:
    old_folder(tmp_path)
    torch.save(torch.zeros(1, 5, 32), tmp_path / "layer_00_output.pt")
    sink, moved = in_memory(tmp_path)
    assert moved.skipped == ("layer_00_output.pt: the number of its layer begins with 0",)
    [(_, values)] = sink.find("layers.0/forward/output")
    assert torch.equal(values, read(tmp_path / "layer_0_output.pt"))


def test_two_files_do_not_claim_one_name(tmp_path: Path) -> None:
    """What the metadata says of names is only taken where no other file has the name."""
    old_folder(tmp_path)
    claims = {"layer_1": {"name": "layers.0/forward/output"}}
    torch.save({"tensortap": {"records": claims}}, tmp_path / "metadata.pt")
    sink, _ = in_memory(tmp_path)
    assert sorted(sink.names()) == sorted(f"{name}/forward/output" for name in NAMES)


def test_a_numbering_that_begins_with_1_is_noted(tmp_path: Path) -> None:
    folder = old_folder(tmp_path)
    (folder / "layer_0_output.pt").rename(folder / "layer_2_output.pt")
    sink, _ = in_memory(folder)
    assert "one too high" in str(sink.coverage["notes"])


def build(family: str) -> Any:
    """Two layers of a family."""
    torch.manual_seed(1)
    if family == "llama":
        return small_llama()
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    return transformers.MambaForCausalLM(config).eval()


_PATHS = {
    "llama": ("model.embed_tokens", "model.norm", "model.layers.0", "model.layers.1"),
    "gpt2": ("transformer.wte", "transformer.ln_f", "transformer.h.0", "transformer.h.1"),
    "mamba": ("backbone.embeddings", "backbone.norm_f", "backbone.layers.0", "backbone.layers.1"),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
@pytest.mark.filterwarnings("ignore")
def test_a_captured_model_gives_the_right_tensors(tmp_path: Path, family: str, tt: Command) -> None:
    model, wanted = build(family), {}
    for what, path in zip(LAYERS, _PATHS[family], strict=True):

        def keep(_m: object, _a: object, output: Any, what: str = what) -> None:
            wanted[what] = (output[0] if isinstance(output, tuple) else output).clone()

        model.get_submodule(path).register_forward_hook(keep)
    run = attached(model, tmp_path / "run")
    code, moved, _ = tt("export", run, "--layout", "layers-pt", "--out", tmp_path / "out", "--json")
    assert (code, moved) == (0, {"records": 4, "files": 5, "skipped": []})
    assert files(tmp_path / "out") == sorted(
        [*(f"{what}_output.pt" for what in LAYERS), "metadata.pt"]
    )
    for what in LAYERS:
        found = read(tmp_path / "out" / f"{what}_output.pt")
        assert found.shape == (1, 5, 32)
        assert torch.equal(found, wanted[what])


def test_the_metadata_has_the_keys_of_the_older_scripts(tmp_path: Path) -> None:
    export(attached(small_llama(), tmp_path / "run"), tmp_path / "out")
    metadata = read(tmp_path / "out" / "metadata.pt")
    assert metadata["prompt"] == "How are you?"
    assert torch.equal(metadata["input_ids"], IDS)
    assert metadata["config"]["hidden_size"] == 32
    assert metadata["compiler_flags"] == ["-O1"]
    assert sorted(metadata["statistics"]) == LAYERS
    for what, said in metadata["statistics"].items():
        values = read(tmp_path / "out" / f"{what}_output.pt").numpy().astype(np.float64)
        assert said["shape"] == [1, 5, 32]
        assert said["dtype"] == "torch.float32"
        assert said["mean"] == pytest.approx(values.mean(), rel=1e-12, abs=1e-15)
        assert said["std"] == pytest.approx(values.std(ddof=1), rel=1e-12)
        assert (said["min"], said["max"]) == (values.min(), values.max())
        assert (said["has_nan"], said["has_inf"]) == (False, False)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_nan_and_infinity_show_in_the_statistics(
    tmp_path: Path, bad: float, dtype: torch.dtype
) -> None:
    values = torch.ones(1, 2, 4)
    values[0, 1, 2] = bad
    with tensortap.attach(small_llama(), tmp_path / "run", select="lm_head", values="full") as tap:
        tap.record("layers.0/forward/output", values.to(dtype))
    export(tmp_path / "run", tmp_path / "out")
    assert read(tmp_path / "out" / "layer_0_output.pt").dtype == dtype
    said = read(tmp_path / "out" / "metadata.pt")["statistics"]["layer_0"]
    kept = float(values.to(dtype).float()[0, 1, 2])  # fp8 has no infinity.
    assert (said["has_nan"], said["has_inf"]) == (math.isnan(kept), math.isinf(kept))
    assert said["mean"] == pytest.approx((7 + kept) / 8, nan_ok=True)


def test_of_several_forwards_the_first_is_written_and_the_others_named(
    tmp_path: Path, tt: Command
) -> None:
    run = attached(small_llama(), tmp_path / "run", [IDS, IDS + 1, IDS + 2])
    code, moved, _ = tt("export", run, "--layout", "layers-pt", "--out", tmp_path / "out", "--json")
    reason = "this layout holds one forward, and step 0 microbatch 0 was written"
    assert (code, moved["skipped"]) == (1, [f"step {n} microbatch 0: {reason}" for n in (1, 2)])
    with tensortap.open_run(run) as opened:
        wanted = opened.tensor("layers.1/forward/output", step=0)
    assert torch.equal(read(tmp_path / "out" / "layer_1_output.pt"), wanted)
    assert read(tmp_path / "out" / "metadata.pt")["tensortap"]["step"] == 0


def test_records_without_values_are_named(tmp_path: Path, tt: Command) -> None:
    run = attached(
        small_llama(), tmp_path / "run",
        values={"layers.0/*": "full", "layers.1/*": "sample", "*": "stats"},
    )  # fmt: skip
    code, moved, _ = tt("export", run, "--layout", "layers-pt", "--out", tmp_path / "out", "--json")
    assert (code, moved["records"]) == (1, 1)
    assert [line.partition(":")[0] for line in moved["skipped"]] == [
        "embed/forward/output", "layers.1/forward/output", "final_norm/forward/output",
    ]  # fmt: skip
    attached(small_llama(), tmp_path / "bare", values="stats")
    code, _, err = tt(
        "export", tmp_path / "bare", "--layout", "layers-pt", "--out", tmp_path / "none"
    )
    assert (code, "statistics only; capture with values='full'" in err) == (2, True)
    assert not (tmp_path / "none").exists()


def test_a_selection_chooses_layers_and_an_existing_folder_is_kept(
    tmp_path: Path, tt: Command
) -> None:
    run = attached(small_llama(), tmp_path / "run")
    words = ["export", run, "--layout", "layers-pt", "--out", tmp_path / "out"]
    assert tt(*words, "--select", "layers.1/*")[0] == 0
    assert files(tmp_path / "out") == ["layer_1_output.pt", "metadata.pt"]
    code, _, err = tt(*words)
    assert (code, "exists" in err) == (2, True)
    assert files(tmp_path / "out") == ["layer_1_output.pt", "metadata.pt"]


def records_of(path: Path, names: list[str]) -> list[Any]:
    """The records of these modules' outputs without what is counted anew, and their bits."""
    with tensortap.open_run(path) as run:
        found = run.records([f"{name}/forward/output" for name in names])
        return [
            (
                str(r.name), r.native, r.at, r.shape, r.dtype, r.device, r.dims, r.stats,
                run.piece(r).view(torch.uint8).numpy().tobytes(),
            )
            for r in found
        ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_comes_back_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    run = attached(small_llama().to(dtype), tmp_path / "run")
    export(run, tmp_path / "out")
    load(tmp_path / "out", tmp_path / "back")
    assert records_of(tmp_path / "back", NAMES) == records_of(run, NAMES)
    with tensortap.open_run(run) as one, tensortap.open_run(tmp_path / "back") as two:
        for field in (
            "created",
            "model_class",
            "model_config",
            "mode",
            "versions",
            "metadata",
            "settings",
        ):
            assert getattr(two.info, field) == getattr(one.info, field), field
    export(tmp_path / "back", tmp_path / "again")
    for name in files(tmp_path / "out"):
        one, two = read(tmp_path / "out" / name), read(tmp_path / "again" / name)
        assert torch.equal(one, two) if name != "metadata.pt" else str(one) == str(two)


def test_files_of_the_older_guide_come_back_with_their_padding(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    old = old_folder(tmp_path / "old", attention_mask=mask)
    load(old, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "back")
    for what in LAYERS:
        name = f"{what}_output.pt"
        assert torch.equal(read(tmp_path / "back" / name), read(old / name))
    metadata = read(tmp_path / "back" / "metadata.pt")
    assert metadata["prompt"] == "How are you?"
    assert torch.equal(metadata["input_ids"], IDS)
    assert torch.equal(metadata["attention_mask"], mask)
    recorder = OldRecorder(small_llama())
    recorder.outputs = {what: read(old / f"{what}_output.pt") for what in LAYERS}
    for what, said in recorder.statistics().items():
        found = metadata["statistics"][what]
        assert found.pop("shape") == said.pop("shape")
        assert found.pop("dtype") == said.pop("dtype")
        assert found == pytest.approx(said, rel=1e-4, abs=1e-7)


def test_padding_that_only_the_placement_knows_becomes_a_mask(tmp_path: Path) -> None:
    old = old_folder(tmp_path / "old", attention_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    load(old, tmp_path / "run")
    with tensortap.open_run(tmp_path / "run") as run:
        object.__setattr__(run.info, "metadata", {})
        layout("layers-pt").export(run, tmp_path / "out", "*", lambda done: None)
    assert read(tmp_path / "out" / "metadata.pt")["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]


def test_torch_before_2_6_says_what_it_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = old_folder(tmp_path)
    monkeypatch.delattr(torch.serialization, "get_unsafe_globals_in_checkpoint")
    sink, moved = in_memory(folder)
    assert len(sink.records) == 4
    assert moved.skipped == (
        "metadata.pt: cannot be read: it holds objects that only code could rebuild, and code in a "
        "file is never run",
    )


def test_metadata_of_a_generous_size_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensortap_neuron.layouts import files as reading

    folder = old_folder(tmp_path, prompt="x" * 5000)
    monkeypatch.setattr(reading, "MOST_PICKLE", 1000)
    sink, moved = in_memory(folder)
    assert len(sink.records) == 4
    assert "describes its tensors in" in moved.skipped[0]
