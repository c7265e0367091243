import argparse
import json
import os
import pickle
import random
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.transformer.enums import AttnBackend
from safetensors.torch import save_file
from tests.analysis.weights.checkpoints import read, reasons, safetensors_folder, small_state
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from tensortap_analysis.weights import CheckpointError, Scope


class Payload:
    """Unpickled by pickle itself, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def header(tensors, data=b"", length=None):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


BROKEN = {
    "empty file": b"",
    "no length": b"\x01\x02",
    "header longer than the file": header({"a": tensor(0, 8)}, bytes(8), length=1 << 40),
    "length of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"oops",
    "JSON that is no object": header([1, 2]),
    "data beyond the end": header({"a": tensor(0, 8)}, bytes(4)),
    "overlapping tensors": header({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "a gap": header({"a": tensor(0, 8), "b": tensor(16, 24)}, bytes(24)),
    "bytes that are nobody's": header({"a": tensor(0, 8)}, bytes(16)),
    "shape and bytes that differ": header({"a": tensor(0, 8, (3,))}, bytes(8)),
    "negative offsets": header({"a": tensor(-8, 0)}, bytes(8)),
    "a shape that overflows": header({"a": tensor(0, 8, (1 << 62, 1 << 62))}, bytes(8)),
    "an unknown dtype": header({"a": {**tensor(0, 8), "dtype": "F99"}}, bytes(8)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_safetensors_files_are_one_clear_error(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is no whole safetensors file"):
        Scope(path)


def test_every_truncation_of_a_safetensors_file_is_an_error(tmp_path):
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            Scope(tmp_path / "cut.safetensors")


def test_names_with_paths_and_control_characters_are_only_names(tmp_path):
    names = ["../../etc/passwd", "/abs", "a\x1b[31mb", "c\n\rd", "..", "[bold]x[/]"]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan("norms", output=tmp_path / "report.json")
    assert set(result) == set(names)
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", "report.json"}


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, "C:x", "a\\b"]
)
def test_an_index_may_only_name_files_beside_it(tmp_path, shard):
    index = {"weight_map": {"a.weight": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only files beside it are read"):
        Scope(tmp_path)


def test_missing_shards_are_counted_and_named(tmp_path):
    folder = safetensors_folder(tmp_path / "m", small_state(), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of 3 shards: model-00002-of-00003"):
        Scope(folder)


def test_an_index_that_lists_tensors_no_shard_holds_is_refused(tmp_path):
    folder = safetensors_folder(tmp_path / "m", small_state(), 2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"no shard holds: ghost\.weight"):
        Scope(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        Scope(tmp_path)


def test_one_name_in_two_files_is_refused(tmp_path):
    for file in ("a.safetensors", "b.safetensors"):
        save_file({"x.weight": torch.ones(2, 2)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=r"both in a\.safetensors and in b\.safetensors"):
        Scope(tmp_path)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_payload_in_a_state_dict_is_refused_and_not_run(tmp_path, old):
    made = tmp_path / "made"
    content = {"a.weight": torch.ones(2, 2), "x": Payload(made)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=r"needs posix\.mkdir to be rebuilt"):
        Scope(tmp_path / "x.pt")
    assert not made.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": Payload(tmp_path / "made")}))
    with warnings.catch_warnings(), pytest.raises(CheckpointError):
        warnings.simplefilter("error")
        Scope(tmp_path / "x.pt")
    assert not (tmp_path / "made").exists()


def test_truncated_state_dicts_are_an_error(tmp_path):
    torch.save({"a.weight": torch.ones(8, 8)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            Scope(tmp_path / "cut.pt")


def test_a_state_dict_whose_record_is_shorter_than_its_tensor_is_an_error(tmp_path):
    torch.save({"a.weight": torch.ones(64, 64)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as source,
        zipfile.ZipFile(tmp_path / "y.pt", "w") as target,
    ):
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:16] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError):
        Scope(tmp_path / "y.pt").scan("norms")


def test_an_archive_that_claims_to_span_disks_is_an_error(tmp_path):
    torch.save({"a.weight": torch.ones(4, 4)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    end = content.rindex(b"PK\x06\x07")
    content[end + 16] = 7
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt is no whole file"):
        Scope(tmp_path / "x.pt")


def test_options_of_a_training_script_beside_the_weights_do_no_harm(tmp_path):
    folder = tmp_path / "iter_0000005" / "mp_rank_00"
    folder.mkdir(parents=True)
    state = small_state()
    content = {
        "args": argparse.Namespace(lr=1e-4, attention_backend=AttnBackend.auto),
        "rng_state": [{"np_rng_state": np.random.get_state(), "random": random.getstate()}],
        "model": state,
        "iteration": 5,
    }
    torch.save(content, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert set(read(tmp_path)) == set(state)


def distributed(folder):
    torch.manual_seed(0)
    dcp.save({"a.weight": torch.randn(8, 4)}, checkpoint_id=folder, no_dist=True)
    return folder


def rewritten(folder, change):
    """The checkpoint with its description changed."""
    path = folder / ".metadata"
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content))
    return folder


def test_a_payload_in_the_metadata_of_a_distributed_checkpoint_is_not_run(tmp_path):
    folder = distributed(tmp_path / "c")
    rewritten(folder, lambda content: setattr(content, "planner_data", Payload(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=r"it names posix\.mkdir"):
        Scope(folder)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"ctorch.serialization\nload\n(S'x'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"cbuiltins\ngetattr\n(S'1'\nS'x'\ntR.",
        b"",
        b"\x80\x04.",
        b"N.",
    ],
)
def test_metadata_that_names_anything_else_is_refused(tmp_path, opcodes):
    folder = distributed(tmp_path / "c")
    (folder / ".metadata").write_bytes(opcodes)
    with pytest.raises(CheckpointError, match="metadata is not read"):
        Scope(folder)


def place(content):
    return next(iter(content.storage_data.values()))


def beyond(content):
    place(content).length = 1 << 40


def elsewhere(content):
    place(content).relative_path = "../../etc/passwd"


def absent(content):
    place(content).relative_path = "__9_9.distcp"


def negative(content):
    place(content).offset = -5


def overlapping(content):
    facts = content.state_dict_metadata["a.weight"]
    halves = [torch.Size([0, 0]), torch.Size([2, 0])]
    facts.chunks = [ChunkStorageMetadata(half, torch.Size([4, 4])) for half in halves]
    old = place(content)
    content.storage_data = {MetadataIndex("a.weight", half): old for half in halves}


def incomplete(content):
    facts = content.state_dict_metadata["a.weight"]
    facts.size = torch.Size([16, 4])


def outside(content):
    facts = content.state_dict_metadata["a.weight"]
    facts.chunks = [ChunkStorageMetadata(torch.Size([4, 0]), torch.Size([8, 4]))]


def compressed(content):
    place(content).transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (beyond, "the file was cut"),
        (elsewhere, "only files beside it are read"),
        (absent, "cannot be found"),
        (negative, "does not say where"),
        (overlapping, "do not fill"),
        (incomplete, "do not fill"),
        (outside, "lies outside"),
        (compressed, "is compressed"),
    ],
)
def test_a_description_that_contradicts_the_files_is_refused(tmp_path, change, words):
    with pytest.raises(CheckpointError, match=words):
        Scope(rewritten(distributed(tmp_path / "c"), change))


def test_bytes_of_a_distributed_checkpoint_that_are_no_tensor_are_an_error(tmp_path):
    folder = distributed(tmp_path / "c")
    [file] = folder.glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="are no tensor"):
        Scope(folder).scan("norms")


def test_a_payload_in_a_distcp_file_is_not_run(tmp_path):
    folder = distributed(tmp_path / "c")
    [file] = folder.glob("*.distcp")
    torch.save(Payload(tmp_path / "made"), file)
    size = file.stat().st_size
    rewritten(folder, lambda content: setattr(place(content), "length", size))
    with pytest.raises(CheckpointError, match="are no tensor"):
        Scope(folder).scan("norms")
    assert not (tmp_path / "made").exists()


def test_a_training_folder_may_only_name_a_folder_below_it(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError):
        Scope(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is not a file"):
        Scope(tmp_path / "x.safetensors")


def test_a_pipe_beside_the_weights_is_not_waited_for(tmp_path):
    save_file({"a.weight": torch.randn(2, 2)}, tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "metadata.json")
    assert set(read(tmp_path)) == {"a.weight"}


@pytest.mark.parametrize("content", [b"9" * 5000, b"7" * 500, b"\xff\xfe", "\u0663".encode()])
def test_a_latest_iteration_that_is_none_is_one_clear_error(tmp_path, content):
    (tmp_path / "latest_checkpointed_iteration.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration\.txt"):
        Scope(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a" * 5000])
def test_a_reference_in_the_cache_that_is_none_is_one_clear_error(tmp_path, content, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--m" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--m" / "refs" / "main").write_bytes(content)
    with pytest.raises(CheckpointError, match="main holds no name"):
        Scope("org/m")


@pytest.mark.parametrize("key", ["model", "x"])
def test_a_state_dict_that_contains_itself_is_an_error(tmp_path, key):
    for beside in (torch.ones(2, 2), 3):
        content = {"a": beside}
        content[key] = content
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=r"x\.pt contains itself"):
            Scope(tmp_path / "x.pt")


def test_a_list_that_contains_itself_is_an_error(tmp_path):
    endless = [torch.ones(2, 2)]
    endless.append(endless)
    torch.save({"x": endless}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="contains itself"):
        Scope(tmp_path / "x.pt")


@pytest.mark.parametrize("leaf", [torch.ones(2, 2), 3])
def test_lists_that_share_lists_are_gone_through_once_and_said(tmp_path, leaf):
    shared = [leaf]
    for _ in range(60):
        shared = [shared, shared]
    torch.save({"a.weight": torch.ones(3, 3), "x": shared}, tmp_path / "x.pt")
    torch.save({"model": {"a.weight": torch.ones(3, 3)}, "x": shared}, tmp_path / "y.pt")
    assert "a" in Scope(tmp_path / "x.pt").scan("norms")
    assert list(Scope(tmp_path / "y.pt").scan("norms")) == ["a"]
    found = reasons(tmp_path / "x.pt")
    assert len(found) == (60 if isinstance(leaf, torch.Tensor) else 0)
    assert found.get("x.1", "the same as x.0: counted there") == "the same as x.0: counted there"


def test_a_tensor_that_repeats_few_stored_values_is_not_written_out(tmp_path):
    repeated = torch.zeros(1).expand(1 << 30, 1 << 30)
    torch.save({"a.weight": repeated, "b.weight": torch.ones(2, 2)}, tmp_path / "x.pt")
    assert reasons(tmp_path / "x.pt") == {"a.weight": "repeats 1 stored values; not read"}
    assert list(Scope(tmp_path / "x.pt").scan("norms")) == ["b"]


def test_a_shape_of_no_values_takes_no_memory_however_long_it_is(tmp_path):
    tensors = {"a.weight": tensor(0, 0, (0, 1 << 40)), "b.weight": tensor(0, 8)}
    (tmp_path / "x.safetensors").write_bytes(header(tensors, bytes(8)))
    assert reasons(tmp_path / "x.safetensors") == {"a.weight": "0 x 1099511627776 has no values"}
    assert len(Scope(tmp_path / "x.safetensors").scan().facts) == 1


@pytest.mark.parametrize("name", ["..", "../x", "a/b/c", "x\0y", "", "-"])
def test_what_cannot_be_a_path_or_name_is_one_clear_error(tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        Scope(name)


def test_files_of_one_rank_each_are_scanned_by_themselves_and_that_is_said(tmp_path):
    for rank in range(2):
        folder = tmp_path / f"mp_rank_{rank:02d}"
        folder.mkdir()
        torch.save({"model": {"a.weight": torch.randn(4, 4)}}, folder / "model_optim_rng.pt")
    source = Scope(tmp_path).source
    assert [one.layer for one in source.weights] == ["mp_rank_00.a", "mp_rank_01.a"]
    assert "measured piece by piece" in source.notes[0]
    assert reasons(tmp_path) == {}
