import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.analysis.weights.checkpoints import safetensors_folder, small_state
from torch import nn

from tensortap.errors import ConfigError, SelectionError
from tensortap_analysis.weights import (
    METHODS,
    Options,
    ReportError,
    ScanResult,
    Scope,
    pool,
    scanning,
)
from tensortap_analysis.weights.health import health
from tensortap_analysis.weights.journal import Journal, key_of
from tensortap_analysis.weights.sources import CheckpointError
from tensortap_analysis.weights.stacks import worst


def with_condition(n, condition):
    q1, q2 = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for _ in range(2))
    return q1 * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ q2


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    return safetensors_folder(tmp_path / "m", small_state(), 2)


def test_the_example_of_the_documentation_holds(folder):
    for layer, stats in Scope(folder).scan(methods=["spectral", "quantization"]).items():
        weight = Scope(folder).weights(layer)[0].read().double().numpy()
        s = np.linalg.svd(weight, compute_uv=False)
        assert stats["spectral"]["condition_number"] == pytest.approx(s[0] / s[-1], rel=1e-6)
        assert stats["spectral"]["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2)
        assert stats["spectral"]["total_rank"] == np.linalg.matrix_rank(weight)
        beyond = np.abs(weight - weight.mean()) > 3 * weight.std()
        found = stats["quantization"]["extreme_outlier_percentage"]
        assert found == pytest.approx(100 * beyond.mean())


def test_layers_have_their_native_path_and_the_order_of_the_model(folder):
    result = Scope(folder).scan("norms")
    layers = [f"model.layers.{n}.{m}" for n in range(3)
              for m in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj")]  # fmt: skip
    assert list(result) == ["lm_head", "model.embed_tokens", *layers]
    assert set(result.vectors) == {f"model.layers.{n}.input_layernorm" for n in range(3)} | {
        "model.norm"
    }
    assert result.facts["model.layers.1.mlp.up_proj"].shape == (64, 16)
    assert result.parameters == sum(tensor.numel() for tensor in small_state().values())


@pytest.mark.parametrize("parallel", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(folder, tmp_path, parallel):
    Scope(folder).scan(output=tmp_path / "one.json")
    Scope(folder).scan(parallel=parallel, output=tmp_path / "many.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "many.json").read_bytes()


def test_the_number_of_threads_does_not_change_numbers_and_is_given_back(folder):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = Scope(folder).scan()
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert Scope(folder).scan() == two
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_two_scans_at_once_give_the_number_of_threads_back(folder, monkeypatch, first_to_end):
    both, ended, seen = threading.Barrier(2, timeout=20), threading.Event(), {}
    real = scanning.measured

    def measured(weight, methods, options):
        if weight.layer == "lm_head":
            both.wait()
            if len(methods) - 1 != first_to_end:
                assert ended.wait(20)
        return real(weight, methods, options)

    def scan(number):
        assert torch.get_num_threads() == 2  # From now on this thread has its own number.
        both.wait()
        Scope(folder).scan(["norms", "sparsity"][: number + 1], parallel=1)
        seen[number] = torch.get_num_threads()
        ended.set()

    monkeypatch.setattr(scanning, "measured", measured)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        scans = [threading.Thread(target=scan, args=(number,)) for number in (0, 1)]
        for one in scans:
            one.start()
        for one in scans:
            one.join()
        assert seen == {0: 2, 1: 2}
        fresh = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (fresh, torch.get_num_threads()) == ([2], 2)
    finally:
        torch.set_num_threads(before)


def test_workers_measure_at_the_same_time(folder, monkeypatch):
    both = threading.Barrier(2, timeout=20)
    real = scanning.measured

    def measured(weight, methods, options):
        if weight.layer in ("lm_head", "model.embed_tokens"):
            both.wait()
        return real(weight, methods, options)

    monkeypatch.setattr(scanning, "measured", measured)
    assert len(Scope(folder).scan("norms", parallel=2)) == 11


def test_every_weight_is_in_the_result_or_has_a_reason(folder):
    scope = Scope(folder)
    for methods in ("all", "spectral", "norms"):
        result = scope.scan(methods)
        named = {one.name.removesuffix(".weight") for one in result.skipped}
        assert {weight.layer for weight in scope.source.weights} == named | {
            *result, *result.vectors
        }  # fmt: skip
    assert {(one.method, one.reason) for one in scope.scan("spectral").skipped} == {
        ("spectral", "a vector has no spectrum")
    }


def test_a_scan_is_read_back_as_it_was(folder, tmp_path):
    result = Scope(folder).scan(options=Options(("mxfp4",), full_spectrum=True))
    result.save(tmp_path / "r.json")
    assert ScanResult.load(tmp_path / "r.json") == result
    assert len(result["lm_head"]["spectral"]["spectrum"]) == 16
    assert list(result["lm_head"]["quantization"]["formats"]) == ["mxfp4"]


def test_infinite_metrics_are_saved_as_words_and_read_back(tmp_path):
    save_file({"x.weight": torch.diag(torch.tensor([1.0, 0.0]))}, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan(output=tmp_path / "r.json")
    assert result["x"]["spectral"]["condition_number"] == math.inf
    json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert ScanResult.load(tmp_path / "r.json") == result


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"kind": "tensortap-scan", "schema": 9}', "[" * 9999]
)
def test_a_file_that_is_no_scan_is_refused(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ReportError, match="is no saved scan"):
        ScanResult.load(tmp_path / "r.json")


def no_number(row):
    row["spectral"]["condition_number"] = "abc"


def no_metrics(row):
    row["spectral"] = [1, 2]


def no_reasons(row):
    del row["spectral"]["unresolved"]


def no_shape(row):
    row["weight"]["shape"] = "ab"


def negative_shape(row):
    row["weight"]["shape"] = [-1, 4]


def no_method(row):
    del row["quantization"]


def not_a_number(row):
    row["spectral"]["s_max"] = math.nan


def put(method, metric, value):
    return lambda row: row[method].__setitem__(metric, value)


DAMAGES = [
    no_number, no_metrics, no_reasons, no_shape, negative_shape, no_method, not_a_number,
    put("norms", "l2", [1]), put("norms", "l2", True), put("norms", "nan", "inf"),
    put("spectral", "rank_errors", {"abc": 1.0}), put("spectral", "rank_errors", {"1": {}}),
    put("spectral", "condition_number", 10**400), put("quantization", "formats", 3),
    put("quantization", "formats", {"mxfp4": "much"}), put("sparsity", "rows", {}),
    put("sparsity", "dead_rows_at", [[]]), put("norms", "largest_at", 3),
    put("spectral", "experts", {"count": 2, "s_max": {"worst": 1}}),
    put("weight", "dtype", 5), put("weight", "shape", []), put("weight", "kind", "odd"),
    put("weight", "note", [3]), put("spectral", "unresolved", {"s_max": 3}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("source", 5), ("notes", [3]), ("methods", ["norms", "magic"]), ("methods", "norms"),
        ("skipped", [{"name": "x", "reason": [3], "method": None}]), ("layers", {}),
        ("peers", {"x": 3}),
    ],
)  # fmt: skip
def test_a_report_whose_head_is_damaged_is_refused(tmp_path, key, value):
    save_file({"x.weight": torch.randn(4, 4)}, tmp_path / "x.safetensors")
    Scope(tmp_path / "x.safetensors").scan(output=tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**document, key: value}))
    with pytest.raises(ReportError, match=r"r\.json is no saved scan"):
        ScanResult.load(tmp_path / "r.json")


@pytest.mark.parametrize(
    "line", ['{"name": "x.weight", "digest": "0", "stats": 5}', '{"name": 3}', "[]", "{}",
             '{"name": "x.weight", "digest": "0", "stats": {"norms": {"l2": "abc"}}}'],
)  # fmt: skip
def test_lines_of_a_journal_that_no_scan_wrote_count_as_not_written(tmp_path, line):
    save_file({"x.weight": torch.randn(4, 4)}, tmp_path / "x.safetensors")
    scope = Scope(tmp_path / "x.safetensors")
    wanted = scope.scan(output=tmp_path / "r.json")
    path = tmp_path / "r.json.journal"
    with Journal(path, key_of(scope.source, wanted.methods, wanted.options)):
        pass
    with path.open("a") as file:
        file.write(f"{line}\n")
    assert scope.scan(output=tmp_path / "r.json") == wanted


def test_a_folder_in_the_place_of_the_journal_is_said(tmp_path):
    save_file({"x.weight": torch.randn(4, 4)}, tmp_path / "x.safetensors")
    (tmp_path / "r.json.journal").mkdir()
    with pytest.raises(ConfigError, match=r"r\.json\.journal is a directory"):
        Scope(tmp_path / "x.safetensors").scan(output=tmp_path / "r.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_report_is_refused_with_its_name(tmp_path, damage):
    save_file({"x.weight": torch.randn(4, 4)}, tmp_path / "x.safetensors")
    Scope(tmp_path / "x.safetensors").scan(output=tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    damage(document["layers"]["x"])
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(ReportError, match=r"r\.json is no saved scan"):
        ScanResult.load(tmp_path / "r.json")


def test_a_report_of_no_text_is_refused_in_few_words(tmp_path):
    (tmp_path / "r.json").write_bytes(b"\xff" * 5000)
    with pytest.raises(ReportError, match=r"r\.json is no saved scan: it is no text\.$"):
        ScanResult.load(tmp_path / "r.json")


def test_a_selection_takes_layers_by_their_path(folder):
    scope = Scope(folder)
    assert list(scope.scan("norms", select="model.layers.1.*,!*down_proj")) == [
        "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"
    ]  # fmt: skip
    assert list(scope.scan("norms", select="lm_head,*embed_tokens")) == [
        "lm_head", "model.embed_tokens"
    ]  # fmt: skip
    with pytest.raises(SelectionError, match="up_proj"):
        scope.scan(select="model.layers.1.mlp.up_prj")


@pytest.mark.parametrize("methods", ["spectrum", "", [], "norms,sprctral"])
def test_a_method_there_is_not_is_refused_before_anything_is_read(folder, methods):
    with pytest.raises(ConfigError, match=r"method"):
        Scope(folder).scan(methods)


def test_copied_matrices_have_their_rows_and_constant_ones_are_no_copies(tmp_path):
    x = torch.randn(8, 8)
    state = {
        "a.weight": x,
        "b.weight": x.clone(),
        "c.weight": x.t().contiguous(),
        "d.lora_B.weight": torch.zeros(8, 2),
        "e.lora_B.weight": torch.zeros(8, 2),
    }
    save_file(state, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan()
    assert set(result) == {"a", "b", "c", "d.lora_B", "e.lora_B"}
    assert result["b"] == result["a"]
    copies = {layer: facts.copy_of for layer, facts in result.facts.items() if facts.copy_of}
    assert copies == {"b": "a.weight"}
    assert result.notes == ("b.weight has the very values of a.weight: tied or copied",)
    assert not result.skipped


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 3, 3, 3), (2, 0, 5), (0, 5, 20)])
def test_a_weight_without_values_has_its_row_and_does_not_end_the_scan(tmp_path, shape):
    state = {"a.experts.weight": torch.empty(shape), "b.weight": torch.randn(4, 4)}
    save_file(state, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan(output=tmp_path / "r.json")
    assert {"a.experts", "b"} <= set(result) | set(result.vectors)
    assert ScanResult.load(tmp_path / "r.json") == result
    assert {issue.layer for issue in health(result).issues["critical"]} == set()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_layers_that_diverged_alike_are_no_copies(tmp_path, value):
    state = {f"{layer}.weight": torch.full((4, 4), value) for layer in range(3)}
    state["3.weight"] = state["0.weight"].clone()
    if math.isnan(value):
        for tensor in state.values():
            tensor[0, 0] = 1.0
    save_file(state, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan()
    assert set(result) == {"0", "1", "2", "3"}
    assert not any(facts.copy_of for facts in result.facts.values())


def test_copies_are_found_in_every_stored_dtype(tmp_path):
    dtypes = (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    state = {}
    for index, dtype in enumerate(dtypes):
        state[f"{index}.a.weight"] = torch.randn(4, 4).to(dtype)
        state[f"{index}.b.weight"] = state[f"{index}.a.weight"].clone()
    save_file(state, tmp_path / "x.safetensors")
    facts = Scope(tmp_path / "x.safetensors").scan("norms").facts
    for index in range(len(dtypes)):
        assert facts[f"{index}.b"].copy_of == f"{index}.a.weight"


def interrupted(scope, output, after, **settings):
    """A scan that is stopped after so many weights."""
    count = 0

    def progress(done, total):
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scope.scan(output=output, progress=progress, **settings)


def counted(monkeypatch):
    names = []
    real = scanning.measured

    def measured(weight, methods, options):
        names.append(weight.name)
        return real(weight, methods, options)

    monkeypatch.setattr(scanning, "measured", measured)
    return names


def test_an_interrupted_scan_goes_on_and_ends_with_the_same_bytes(folder, tmp_path, monkeypatch):
    Scope(folder).scan(output=tmp_path / "whole.json")
    interrupted(Scope(folder), tmp_path / "r.json", after=6)
    assert not (tmp_path / "r.json").exists()
    names = counted(monkeypatch)
    Scope(folder).scan(output=tmp_path / "r.json")
    assert len(names) == 15 - 6
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "r.json.journal").exists()


def test_a_journal_cut_off_anywhere_loses_one_weight_at_most(folder, tmp_path, monkeypatch):
    Scope(folder).scan("norms", output=tmp_path / "whole.json")
    interrupted(Scope(folder), tmp_path / "r.json", after=4, methods="norms")
    journal = tmp_path / "r.json.journal"
    whole = journal.read_bytes()
    for length in range(0, len(whole), 211):
        journal.write_bytes(whole[:length])
        Scope(folder).scan("norms", output=tmp_path / "r.json")
        assert (tmp_path / "r.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize("change", ["file", "methods", "options"])
def test_a_journal_of_other_files_or_methods_is_not_used(folder, tmp_path, monkeypatch, change):
    interrupted(Scope(folder), tmp_path / "r.json", after=6)
    settings = {}
    if change == "file":
        for path in folder.glob("*.safetensors"):
            path.touch()
    else:
        settings = {"methods": "norms"} if change == "methods" else {"options": Options(("int8",))}
    names = counted(monkeypatch)
    Scope(folder).scan(output=tmp_path / "r.json", **settings)
    assert len(names) == 15


@pytest.mark.parametrize("change", ["folder", "config"])
def test_a_journal_of_a_checkpoint_of_the_same_name_size_and_time_is_not_used(
    tmp_path, monkeypatch, change
):
    folders = [tmp_path / "a", tmp_path / ("b" if change == "folder" else "a")]
    for folder in folders[:1] if change == "config" else folders:
        safetensors_folder(folder, small_state())
        os.utime(folder / "model.safetensors", (1, 1))
    interrupted(Scope(folders[0]), tmp_path / "r.json", after=6)
    if change == "config":
        (tmp_path / "a" / "config.json").write_text("{}")
    names = counted(monkeypatch)
    result = Scope(folders[1]).scan(output=tmp_path / "r.json")
    assert len(names) == 15
    assert result == Scope(folders[1]).scan()


def test_a_killed_scan_goes_on(folder, tmp_path):
    script = (
        "import os, sys; from tensortap_analysis.weights import Scope\n"
        "count = []\n"
        "def progress(done, total):\n"
        "    count.append(1)\n"
        "    if len(count) > 5: os._exit(9)\n"
        "Scope(sys.argv[1]).scan('norms', output=sys.argv[2], progress=progress)"
    )
    output = tmp_path / "r.json"
    done = subprocess.run([sys.executable, "-c", script, str(folder), str(output)])
    assert done.returncode == 9
    assert len((tmp_path / "r.json.journal").read_text().splitlines()) == 6
    assert len(Scope(folder).scan("norms", output=output)) == 11


def test_a_live_module_is_scanned_without_a_journal(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Conv2d(3, 2, 3))
    result = Scope(model).scan(output=tmp_path / "r.json")
    assert list(result) == ["0", "2"]
    assert result["2"]["sparsity"]["columns"] == 27
    assert result.source == "Sequential"
    assert {path.name for path in tmp_path.iterdir()} == {"r.json"}


@pytest.mark.parametrize(
    "module",
    [nn.ConvTranspose2d(6, 4, 3), nn.ConvTranspose1d(5, 7, 2), nn.Conv2d(6, 4, 3), nn.Linear(5, 9)],
    ids=lambda module: type(module).__name__,
)
def test_a_module_has_the_numbers_of_the_file_it_was_saved_to(tmp_path, module):
    with torch.no_grad():
        module.weight[2] = 0
    live = Scope(nn.Sequential(module)).scan()
    save_file(dict(nn.Sequential(module).state_dict()), tmp_path / "x.safetensors")
    saved = Scope(tmp_path / "x.safetensors").scan()
    assert live["0"] == saved["0"]
    assert live["0"]["sparsity"]["dead_rows_at"] == [2]
    turned = "Transpose" in type(module).__name__
    assert ("its rows are inputs" in (live.facts["0"].note or "")) == turned


def test_a_folder_that_is_not_there_is_said_before_anything_is_measured(folder, tmp_path):
    with pytest.raises(ConfigError, match="there is no directory"):
        Scope(folder).scan(output=tmp_path / "no" / "r.json")


def test_what_is_finished_beside_an_error_is_handed_on():
    both, handed = threading.Barrier(2, timeout=20), []

    def work(job):
        both.wait()
        if job == "broken":
            raise CheckpointError("broken")
        return job

    for jobs in (("broken", "fine"), ("fine", "broken")):
        wait = pool.wait
        with pytest.MonkeyPatch.context() as patch:
            # Both have ended when either is looked at.
            patch.setattr(pool, "wait", lambda futures, return_when, wait=wait: wait(futures))
            with pytest.raises(CheckpointError):
                pool.in_workers(jobs, work, parallel=2, done=lambda job, _: handed.append(job))
    assert handed == ["fine", "fine"]


def test_an_error_in_one_file_ends_the_scan_with_its_name(folder):
    scope = Scope(folder)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="model-00001-of-00002"):
        scope.scan("norms", parallel=2)


def test_places_in_a_stack_begin_with_the_expert_and_shares_are_of_all_values(tmp_path):
    torch.manual_seed(0)
    experts = torch.randn(3, 24, 8)
    experts[1, 5] = 0
    experts[2, 7] = experts[2, 3]
    experts[2, :, 6] = 0
    save_file({"mlp.experts.down_proj": experts}, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan(options=Options((), full_spectrum=True))
    found = result["mlp.experts.down_proj"]["sparsity"]
    assert found["dead_rows_at"] == [[1, 5]]
    assert found["dead_columns_at"] == [[2, 6]]
    assert found["duplicated_rows_at"] == [[2, 7, 3]]
    assert found["zeros"] == 8 + 24
    assert found["zero_fraction"] == 32 / experts.numel()
    assert found["near_zero_fraction"] == found["near_zeros"] / experts.numel()
    spectral = result["mlp.experts.down_proj"]["spectral"]
    assert spectral["spectrum"] is None
    assert "not kept of a stack" in spectral["unresolved"]["spectrum"]


def test_a_stack_names_the_matrix_that_leaves_its_worst_value_unresolved(tmp_path):
    torch.manual_seed(0)
    experts = torch.stack([with_condition(24, 10.0**power) for power in (8, 12, 10)]).float()
    save_file({"mlp.experts.down_proj": experts}, tmp_path / "x.safetensors")
    found = Scope(tmp_path / "x.safetensors").scan("spectral")["mlp.experts.down_proj"]["spectral"]
    worst = found["experts"]["condition_number"]["worst"]
    assert found["unresolved"]["condition_number"].startswith(f"matrix {worst}: stored in float32")
    experts[0] = torch.eye(24)
    save_file({"mlp.experts.down_proj": experts}, tmp_path / "x.safetensors")
    found = Scope(tmp_path / "x.safetensors").scan("spectral")["mlp.experts.down_proj"]["spectral"]
    assert found["condition_number"] == pytest.approx(1)
    assert "condition_number" not in found["unresolved"]


def test_a_stack_of_experts_has_the_worst_of_each_metric_and_says_which(tmp_path):
    torch.manual_seed(0)
    experts = torch.randn(4, 24, 8)
    experts[2, :, 0] *= 1e-4
    experts[1, 5] = 0
    experts[3, 0, 0] = 60.0
    save_file({"mlp.experts.down_proj": experts}, tmp_path / "x.safetensors")
    stats = Scope(tmp_path / "x.safetensors").scan()["mlp.experts.down_proj"]
    conditions = [np.linalg.cond(one.double().numpy()) for one in experts]
    spectral = stats["spectral"]
    assert spectral["condition_number"] == pytest.approx(max(conditions), rel=1e-6)
    assert spectral["experts"]["condition_number"]["worst"] == 2
    assert spectral["experts"]["condition_number"]["min"] == pytest.approx(
        min(conditions), rel=1e-6
    )
    assert spectral["s_min"] == pytest.approx(np.linalg.svd(experts[2].numpy())[1][-1], rel=1e-4)
    assert stats["quantization"]["experts"]["sqnr_db"]["worst"] == 3
    assert stats["quantization"]["experts"]["formats.int8"]["worst"] == 3
    assert stats["sparsity"]["dead_rows"] == 1
    assert stats["sparsity"]["experts"]["count"] == 4
    assert stats["norms"]["l2"] == pytest.approx(experts.double().norm().item())
    assert stats["norms"]["l1"] == pytest.approx(experts.double().abs().sum().item())


def test_what_one_expert_leaves_unresolved_the_stack_does():
    parts = [
        {"condition_number": 2.0, "unresolved": {}},
        {"condition_number": None, "unresolved": {"condition_number": "NaN"}},
    ]
    found = worst(parts)
    assert found["condition_number"] == 2.0
    assert found["unresolved"] == {"condition_number": "matrix 1: NaN"}


def test_an_expert_that_is_not_resolved_does_not_hide_one_that_is(tmp_path):
    q = torch.linalg.qr(torch.randn(4, 32, 32, dtype=torch.float64))[0]
    values = torch.ones(4, 32, dtype=torch.float64)
    values[1, 0], values[3, 0] = 1e-5, 1e-10
    state = {"mlp.experts.down_proj": (q * values[:, None]).float().contiguous()}
    save_file(state, tmp_path / "x.safetensors")
    stats = Scope(tmp_path / "x.safetensors").scan()["mlp.experts.down_proj"]["spectral"]
    assert stats["condition_number"] == pytest.approx(1e5, rel=0.1)
    assert stats["experts"]["condition_number"]["worst"] == 1
    assert "condition_number" not in stats["unresolved"]


def test_dead_experts_are_counted_and_leave_the_metrics_of_the_others(tmp_path):
    experts = torch.randn(4, 64, 64)
    alive = experts[[0, 1, 3]].clone()
    experts[2] = 0
    state = {"a.experts.down_proj": experts, "b.experts.down_proj": alive}
    save_file(state, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan()
    some, all_ = result["a.experts.down_proj"], result["b.experts.down_proj"]
    assert (some["sparsity"]["dead_experts"], all_["sparsity"]["dead_experts"]) == (1, 0)
    for method in ("spectral", "quantization"):
        found, wanted = dict(some[method]), dict(all_[method])
        assert found.pop("experts")["count"] == wanted.pop("experts")["count"] + 1
        assert found == wanted
    for preset in ("default", "classic"):
        [issue] = health(result, preset).issues["critical"]
        assert (issue.layer, issue.rule) == ("a.experts.down_proj", "dead experts")
    assert math.isfinite(worst([{"l2": 1e200}, {"l2": 2e200}])["l2"])


def test_float8_with_scales_is_measured_by_its_values(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    scale = x.abs().amax() / 448
    state = {"x.weight": (x / scale).to(torch.float8_e4m3fn), "x.weight_scale": scale.reshape(())}
    save_file(state, tmp_path / "x.safetensors")
    result = Scope(tmp_path / "x.safetensors").scan()
    assert result["x"]["norms"]["l2"] == pytest.approx(x.norm().item(), rel=1e-2)
    assert "condition_number" in result["x"]["spectral"]["unresolved"]
    assert result.facts["x"].dtype == "float8_e4m3fn"


def test_the_memory_of_a_scan_does_not_grow_with_the_checkpoint(tmp_path):
    """Sixteen tensors of 8 MiB: two copies of one may be held, not the file."""
    state = {f"layers.{n}.weight": torch.randn(1024, 2048) for n in range(16)}
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.pt")
    script = """
import sys
from pathlib import Path
from tensortap_analysis.weights import Scope

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

Scope(sys.argv[1]).scan("sparsity,norms", select="layers.0")
before = peak()
for file in sys.argv[1:]:
    Scope(file).scan("sparsity,norms")
print(peak() - before)
"""
    files = [str(tmp_path / "x.safetensors"), str(tmp_path / "x.pt")]
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True)
    assert int(done.stdout) < 20 * 1024, done.stderr


def test_all_methods_are_scanned_by_default(folder):
    assert Scope(folder).scan().methods == METHODS
