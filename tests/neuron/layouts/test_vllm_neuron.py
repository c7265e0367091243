"""The layout `vllm-neuron`: folders that vLLM-Neuron's tensor capture wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.neuron.layouts.commands import Command, padded, small_llama
from tests.neuron.layouts.writers import FakeCaptureWriter

import tensortap
from tensortap.errors import NotSupported, RunConflict, RunError
from tensortap.layouts import Layout, Moved, layout
from tensortap.sinks import MemorySink

MODULES = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
PROMPTS = [[5, 9, 33, 12, 7], [44, 3, 18]]
NEW = 3


class Served:
    """A model whose passes are captured as vLLM-Neuron writes them: flat rows, in buckets."""

    def __init__(
        self, model: Any, writer: FakeCaptureWriter, modules: Sequence[str] = MODULES
    ) -> None:
        self.model, self.writer = model, writer
        self.seen: dict[str, torch.Tensor] = {}
        self.ids: dict[str, list[int]] = {}
        self.caches: dict[str, Any] = {}
        for path, module in model.named_modules():
            if path in modules:

                def keep(_m: object, _a: object, output: Any, path: str = path) -> None:
                    self.seen[path] = (output[0] if isinstance(output, tuple) else output).clone()

                module.register_forward_hook(keep)

    def prefill(self, requests: Mapping[str, list[int]], bucket: int) -> Path:
        """One pass over tokens of several requests, packed and padded on the right."""
        rows: dict[str, list[torch.Tensor]] = {}
        positions: list[int] = []
        for name, tokens in requests.items():
            positions += self._forward(name, tokens)
            for path, tensor in self.seen.items():
                last = path == "lm_head"
                rows.setdefault(path, []).append(tensor[0, -1:] if last else tensor[0])
        positions += [positions[-1]] * (bucket - len(positions))
        flat = {
            path: torch.cat(some) if path == "lm_head" else padded(torch.cat(some), bucket, 0)
            for path, some in rows.items()
        }
        return self.writer.write(flat, list(requests), torch.tensor(positions), prefill=True)

    def decode(self, names: Sequence[str], bucket: int) -> Path:
        """One token of each request; rows beyond them are padding."""
        rows: dict[str, list[torch.Tensor]] = {}
        positions = []
        for name in names:
            positions += self._forward(name, [self.next[name]])
            for path, tensor in self.seen.items():
                rows.setdefault(path, []).append(tensor[0])
        positions += [positions[-1]] * (bucket - len(positions))
        flat = {path: padded(torch.cat(some), bucket, 0) for path, some in rows.items()}
        return self.writer.write(flat, names, torch.tensor(positions), prefill=False)

    @property
    def next(self) -> dict[str, int]:
        """The next token of each request, greedily."""
        return {name: ids[-1] for name, ids in self.ids.items()}

    def _forward(self, name: str, tokens: list[int]) -> list[int]:
        with torch.no_grad():
            found = self.model(
                torch.tensor([tokens]), past_key_values=self.caches.get(name), use_cache=True
            )
        self.caches[name] = found.past_key_values
        self.ids.setdefault(name, [0]).append(int(found.logits[0, -1].argmax()))
        end = found.past_key_values.get_seq_length()
        return list(range(end - len(tokens), end))


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """The same prompts, one `generate` after the other, captured here."""
    model = small_llama()
    with (
        tensortap.attach(
            model, tmp_path / "reference", select="embed,layers.?,final_norm,lm_head", values="full"
        ),
        torch.no_grad(),
    ):
        for prompt in PROMPTS:
            model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
    return tmp_path / "reference"


def serve(folder: Path, model: Any = None) -> Served:
    """Both prompts in one pass of a bucket of 16, then two passes of both, in a bucket of 4."""
    served = Served(model or small_llama(), FakeCaptureWriter(folder))
    served.prefill({"0": PROMPTS[0], "1": PROMPTS[1]}, 16)
    for _ in range(NEW - 1):
        served.decode(["0", "1"], 4)
    return served


def load(folder: Path) -> tuple[MemorySink, Moved]:
    sink = MemorySink()
    return sink, layout("vllm-neuron").load(folder, sink, lambda done: None)


def plain(folder: Path, **tensors: Any) -> None:
    """One pass over a prompt of 3 tokens in a bucket of 8."""
    positions = torch.tensor([0, 1, 2, 2, 2, 2, 2, 2])
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    FakeCaptureWriter(folder).write(named, ["r"], positions, prefill=True)


def test_it_is_a_layout_that_is_only_imported(tmp_path: Path) -> None:
    found: Layout = layout("vllm-neuron")
    assert found.name == "vllm-neuron"
    with pytest.raises(NotSupported, match="only imported"):
        found.export(None, tmp_path, "*", lambda done: None)  # type: ignore[arg-type]


def test_batched_requests_compare_with_prompts_run_one_by_one(
    reference: Path, tmp_path: Path, tt: Command
) -> None:
    serve(tmp_path / "captures")
    words = ["import", tmp_path / "captures", "--layout", "vllm-neuron", "--out", tmp_path / "run"]
    code, moved, _ = tt(*words, "--json")
    assert (code, moved) == (0, {"records": 30, "files": 15, "skipped": []})
    code, found, _ = tt(
        "compare", reference, tmp_path / "run", "--json", "--select", "*/forward/output"
    )
    assert (code, found["verdict"]) == (0, "agree")
    assert (found["runs"][0]["compared"], found["runs"][0]["not_compared"]) == (30, 0)


def test_a_fault_is_found_in_the_folder_itself(
    reference: Path, tmp_path: Path, tt: Command
) -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[2] += 0.5
    serve(tmp_path / "captures", model)
    code, found, _ = tt(
        "compare", reference, tmp_path / "captures", "--json", "--select", "*/*/output"
    )
    assert code == 1
    assert found["runs"][0]["first_divergence"]["tensor"] == "layers.1/forward/output"


def test_requests_positions_and_passes_are_in_the_metadata(tmp_path: Path) -> None:
    serve(tmp_path)
    sink, _ = load(tmp_path)
    requests = sink.run.metadata["requests"]
    assert [(r["id"], r["step"], r["replica"]) for r in requests] == [("0", 0, 0), ("1", 1, 0)]
    assert requests[0]["forwards"] == [
        {"microbatch": 0, "call": 0, "positions": [[0, 5]], "passes": ["prefill_s16_0"]},
        {"microbatch": 1, "call": 0, "positions": [[5, 1]], "passes": ["decode_b4_0"]},
        {"microbatch": 2, "call": 0, "positions": [[6, 1]], "passes": ["decode_b4_1"]},
    ]
    assert {record.native for record in sink.records} == set(MODULES)


def test_a_prompt_in_chunks_is_one_forward(reference: Path, tmp_path: Path, tt: Command) -> None:
    served = Served(small_llama(), FakeCaptureWriter(tmp_path / "captures"))
    served.prefill({"0": PROMPTS[0][:3]}, 4)
    served.prefill({"1": PROMPTS[1]}, 4)
    served.prefill({"0": PROMPTS[0][3:]}, 2)
    code, found, _ = tt(
        "compare",
        reference,
        tmp_path / "captures",
        "--json",
        "--select",
        "layers.?/*/output,lm_head/*/output",
    )
    [run] = found["runs"]
    assert (code, run["verdict"]) == (0, "agree")
    assert run["compared"] == 6
    sink, _ = load(tmp_path / "captures")
    assert [r.shape for r in sink.records if r.name.module == "layers.0"] == [
        (1, 5, 32),
        (1, 3, 32),
    ]
    assert [r.shape for r in sink.records if r.name.module == "lm_head"] == [(1, 1, 64)] * 2


def test_a_cached_beginning_of_a_prompt_is_a_hole_and_not_the_beginning(tmp_path: Path) -> None:
    rows = torch.rand(4, 8)
    FakeCaptureWriter(tmp_path).write(
        {"model.layers.0": rows}, ["r"], torch.tensor([6, 7, 8, 8]), prefill=True
    )
    sink, _ = load(tmp_path)
    [(record, values)] = sink.find("layers.0/forward/output")
    assert torch.equal(values[0], rows[:3])
    assert record.placement.logical_shape == (1, 9, 8)
    assert record.placement.segments == {1: ((6, 3),)}


def test_a_broken_last_chunk_is_a_hole_and_no_logits_of_an_earlier_one(tmp_path: Path) -> None:
    writer = FakeCaptureWriter(tmp_path)
    for start in (0, 3):
        tensors = {"model.norm": torch.rand(3, 8), "lm_head": torch.rand(1, 8)}
        where = writer.write(tensors, ["r"], torch.arange(start, start + 3), prefill=True)
    for module in ("model.norm", "lm_head"):
        (where / module / "rank0.pt").write_bytes(b"damaged")
    sink, moved = load(tmp_path)
    assert len(moved.skipped) == 2
    [record] = sink.records
    assert (str(record.name), record.shape) == ("final_norm/forward/output", (1, 3, 8))
    assert record.placement.logical_shape == (1, 6, 8)
    assert record.placement.segments == {1: ((0, 3),)}


def test_a_hidden_axis_that_neuron_padded_is_cut_to_that_of_the_config(
    reference: Path, tmp_path: Path, tt: Command
) -> None:
    served = Served(small_llama(), FakeCaptureWriter(tmp_path / "captures"))
    where = served.prefill({"0": PROMPTS[0]}, 16)
    for module in MODULES[:-1]:
        path = where / module / "rank0.pt"
        torch.save(padded(torch.load(path), 48, 1), path)
    words = ["--json", "--select", "embed/*/output,layers.?/*/output,final_norm/*/output"]
    code, found, _ = tt("compare", reference, tmp_path / "captures", *words)
    assert (code, found["runs"][0]["compared"]) == (2, 0)
    (tmp_path / "captures" / "config.json").write_text('{"hidden_size": 32}')
    code, found, _ = tt("compare", reference, tmp_path / "captures", *words)
    assert (code, found["verdict"], found["runs"][0]["compared"]) == (0, "agree", 4)
    assert load(tmp_path / "captures")[0].run.model_config == {"hidden_size": 32}
    (tmp_path / "captures" / "config.json").write_text("{")
    assert "config.json: cannot be read" in load(tmp_path / "captures")[1].skipped[0]


def test_a_request_that_was_processed_again_is_a_second_call(tmp_path: Path) -> None:
    writer = FakeCaptureWriter(tmp_path)
    for _ in range(2):
        writer.write({"lm_head": torch.rand(3, 8)}, ["r"], torch.arange(3), prefill=True)
        writer.write({"lm_head": torch.rand(1, 8)}, ["r"], torch.tensor([3]), prefill=False)
    sink, _ = load(tmp_path)
    assert [(r.at.microbatch, r.at.call) for r in sink.records] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_the_reference_that_runs_its_whole_text_again_gives_its_last_token(tmp_path: Path) -> None:
    """As in `compare_hf_vs_vllm_neuron.py` and in `…_with_reconstruction.py` of vLLM-Neuron."""
    writer = FakeCaptureWriter(tmp_path)
    texts = [torch.rand(1, length, 8) for length in (4, 5, 6)]
    writer.write({"model.layers.0": texts[0]}, ["p"], torch.arange(4), prefill=True)
    writer.write({"model.layers.0": texts[1]}, ["p"], torch.arange(5), prefill=False)
    writer.write({"model.layers.0": texts[2]}, ["p"], torch.tensor([5]), prefill=False)
    sink, _ = load(tmp_path)
    assert [r.at.microbatch for r in sink.records] == [0, 1, 2]
    assert torch.equal(sink.payloads[0], texts[0])
    assert torch.equal(sink.payloads[1], texts[1][:, -1:])
    assert torch.equal(sink.payloads[2], texts[2][:, -1:])


def test_ranks_that_hold_the_same_are_written_once(tmp_path: Path) -> None:
    rows = torch.rand(8, 6)
    plain(tmp_path, model__layers__0={rank: rows for rank in range(4)})
    sink, moved = load(tmp_path)
    assert (moved.records, sink.run.world_size) == (1, 1)
    assert "written once" in str(sink.coverage["notes"])


def test_rows_divided_over_ranks_are_put_together(tmp_path: Path, tt: Command) -> None:
    rows = torch.rand(8, 6)
    plain(tmp_path / "captures", model__layers__0=dict(enumerate(rows.split(2))))
    words = ["import", tmp_path / "captures", "--layout", "vllm-neuron", "--out", tmp_path / "run"]
    assert tt(*words)[0] == 0
    with tensortap.open_run(tmp_path / "run") as run:
        assert torch.equal(run.tensor("layers.0/forward/output"), rows[None, :3])
        assert run.ranks == [0, 1]  # Ranks 2 and 3 hold padding only.
        assert run.complete


def test_shards_that_nobody_can_place_are_unknown_and_disagreeing_copies_are_told(
    tmp_path: Path, tt: Command
) -> None:
    shards = {rank: torch.rand(8, 3) for rank in range(2)}
    plain(tmp_path / "captures", model__layers__0__mlp__gate_proj=shards, model__norm=shards)
    words = ["import", tmp_path / "captures", "--layout", "vllm-neuron", "--out", tmp_path / "run"]
    assert tt(*words)[0] == 0
    with tensortap.open_run(tmp_path / "run") as run:
        with pytest.raises(RunError, match="placement of rank 0's piece is unknown"):
            run.tensor("layers.0.mlp.gate/forward/output")
        for rank, shard in shards.items():
            found = run.tensor("layers.0.mlp.gate/forward/output", rank=rank)
            assert torch.equal(found, shard[None, :3])
        with pytest.raises(RunConflict, match="ranks 0 and 1 both hold"):
            run.tensor("final_norm/forward/output")


def test_replicas_have_requests_of_their_own(tmp_path: Path, tt: Command) -> None:
    for replica, requests in enumerate((["0", "2"], ["1"])):
        writer = FakeCaptureWriter(tmp_path / "captures", replica)
        for name in requests:
            rows = torch.full((4, 6), float(name))
            writer.write({"model.norm": rows}, [name], torch.arange(4), prefill=True)
    words = ["import", tmp_path / "captures", "--layout", "vllm-neuron", "--out", tmp_path / "run"]
    assert tt(*words)[0] == 0
    with tensortap.open_run(tmp_path / "run") as run:
        assert run.steps == [0, 1, 2]
        for step in run.steps:
            assert float(run.tensor("final_norm/forward/output", step=step)[0, 0, 0]) == step


def test_ids_are_sorted_as_people_count(tmp_path: Path) -> None:
    writer = FakeCaptureWriter(tmp_path)
    for number in (10, 2, 1):
        writer.write(
            {"lm_head": torch.rand(2, 4)}, [f"prompt_{number}"], torch.arange(2), prefill=True
        )
    sink, _ = load(tmp_path)
    assert [r["id"] for r in sink.run.metadata["requests"]] == ["prompt_1", "prompt_2", "prompt_10"]


@pytest.mark.parametrize(
    ("ids", "positions", "prefill", "wanted"),
    [
        (["a"], [0, 1, 2, 2, 2], True, {"a": [0, 1, 2]}),
        (["a"], [0, 1, 2, 0, 0], True, {"a": [0, 1, 2]}),
        (["a"], [0, 1, 2, -1, -1], True, {"a": [0, 1, 2]}),
        (["a"], [7, 7, 7], True, {"a": [7]}),
        (["a", "b"], [0, 1, 0, 1, 2, 2], True, {"a": [0, 1], "b": [0, 1, 2]}),
        (["a", "b"], [4, 5, 3, 3], True, {"a": [4, 5], "b": [3]}),
        (["a", "b"], [7, 7, 7, 7], False, {"a": [7], "b": [7]}),
        (["a"], [9, 9], False, {"a": [9]}),
        (["a"], [9, 10, 11], False, {"a": [9, 10, 11]}),
        (["a"], [0, 1, 2, 3], False, {"a": [3]}),
    ],
)
def test_positions_tell_tokens_from_padding(
    tmp_path: Path,
    ids: list[str],
    positions: list[int],
    prefill: bool,
    wanted: dict[str, list[int]],
) -> None:
    rows = torch.arange(len(positions) * 2.0).reshape(-1, 2)
    FakeCaptureWriter(tmp_path).write(
        {"lm_head": rows}, ids, torch.tensor(positions), prefill=prefill
    )
    sink, _ = load(tmp_path)
    found = {
        r["id"]: [at for s, n in r["forwards"][0]["positions"] for at in range(s, s + n)]
        for r in sink.run.metadata["requests"]
    }
    assert found == wanted
    assert [values.shape[1] for values in sink.payloads] == [len(some) for some in wanted.values()]


@pytest.mark.parametrize(
    ("ids", "positions", "reason"),
    [
        ([], [0, 1], "names no request"),
        (["a", "b"], [5, 5], "do not tell its 2 requests apart"),
        (["a"], [[0, 1], [0, 1]], "several axes"),
    ],
)
def test_a_pass_that_nobody_can_divide_is_kept_as_it_is(
    tmp_path: Path, ids: list[str], positions: list[Any], reason: str
) -> None:
    rows = torch.rand(2, 6)
    FakeCaptureWriter(tmp_path).write(
        {"model.norm": rows}, ids, torch.tensor(positions), prefill=True
    )
    sink, _ = load(tmp_path)
    assert torch.equal(sink.payloads[0], rows)
    assert sink.run.metadata["requests"][0]["id"] == "prefill_s2_0"
    assert reason in str(sink.coverage["notes"])


def test_a_broken_file_does_not_lose_the_rest(tmp_path: Path, tt: Command) -> None:
    serve(tmp_path / "captures")
    bad = tmp_path / "captures/dp0/decode_b4_0/model.layers.0/rank0.pt"
    bad.write_bytes(b"PK\x03\x04 no zip file")
    words = ["import", tmp_path / "captures", "--layout", "vllm-neuron", "--out", tmp_path / "run"]
    code, moved, _ = tt(*words, "--json")
    assert (code, moved["records"]) == (1, 28)
    [skipped] = moved["skipped"]
    assert skipped.startswith("dp0/decode_b4_0/model.layers.0/rank0.pt: cannot be read: ")
    code, coverage, _ = tt("coverage", tmp_path / "run", "--json")
    assert (code, [gap["name"] for gap in coverage["gaps"]]) == (1, ["layers.0/forward/output"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "its _meta.json is missing"),
        ("{", "cannot be read"),
        ("{}", "'req_ids' must list the ids"),
        ('{"req_ids": ["a"]}', "'positions' must be a list"),
        ('{"req_ids": [1], "positions": []}', "'req_ids' must list the ids"),
    ],
)
def test_a_pass_without_good_metadata_is_kept_and_its_gap_told(
    tmp_path: Path, text: str | None, reason: str
) -> None:
    plain(tmp_path, model__norm=torch.rand(8, 6))
    meta = tmp_path / "dp0/prefill_s8_0/prefill_s8_0_meta.json"
    meta.unlink() if text is None else meta.write_text(text)
    sink, moved = load(tmp_path)
    assert (moved.records, sink.records[0].shape) == (1, (8, 6))
    [gap] = sink.coverage["gaps"]
    assert gap["name"] == "dp0/prefill_s8_0"
    assert reason in gap["reason"]


def test_names_of_folders_are_data(tmp_path: Path) -> None:
    plain(tmp_path, model__norm=torch.rand(8, 6))
    where = tmp_path / "dp0/prefill_s8_0"
    os.rename(where / "model.norm", where / ".. evil,name%00")
    (where / "rank0.pt").write_bytes(b"not in a module's folder")
    (where / "extra").mkdir()
    (where / "extra" / "rankX.pt").write_bytes(b"no rank")
    sink, moved = load(tmp_path)
    assert moved.skipped == ()
    assert sink.names() == ["..%20evil%2Cname%2500/forward/output"]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("captures/dp0", "is one replica"), ("captures/draft/..", ""), ("", "import one: captures"),
     ("captures/dp0/prefill_s16_0", "holds no dp0/"), ("nowhere", "no folder")],
)  # fmt: skip
def test_the_wrong_folder_is_told_from_the_right_one(
    tmp_path: Path, tt: Command, folder: str, reason: str
) -> None:
    serve(tmp_path / "captures")
    (tmp_path / "captures" / "draft").mkdir()
    words = ["import", tmp_path / folder, "--layout", "vllm-neuron", "--out", tmp_path / "run"]
    code, _, err = tt(*words)
    assert (code, reason in err) == (2 if reason else 0, True)
    assert "Traceback" not in err


def test_captures_of_another_model_beside_it_are_named(tmp_path: Path) -> None:
    serve(tmp_path)
    FakeCaptureWriter(tmp_path / "draft").write(
        {"model.norm": torch.rand(1, 4)}, ["0"], torch.tensor([5]), prefill=False
    )
    sink, _ = load(tmp_path)
    [note] = [note for note in sink.coverage["notes"] if note["name"] == "draft"]
    assert "import" in note["reason"]
    assert load(tmp_path / "draft")[1].records == 1


def test_compare_imports_such_a_folder_by_itself(tmp_path: Path, tt: Command) -> None:
    serve(tmp_path / "one")
    serve(tmp_path / "two")
    code, found, _ = tt("compare", tmp_path / "one", tmp_path / "two", "--json")
    assert (code, found["verdict"], found["runs"][0]["compared"]) == (0, "agree", 30)
    assert json.dumps(found)
