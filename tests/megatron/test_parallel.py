"""Runs of real Megatron-core models over several processes, assembled and held against one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.megatron.launching import Launches

import tensortap
from tensortap.errors import RunError
from tensortap.layouts import layout

pytest.importorskip("megatron.core")
# One worker: every launch is used by several tests.
pytestmark = pytest.mark.xdist_group("megatron-parallel")

ROUNDING = 1e-5
"""Of the largest magnitude of a tensor: float32 sums in another order."""


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory)


CONTEXT = ("probs", "input.attention_mask", "input.rotary_pos_emb", "root/forward/input.2")
"""What context parallelism leaves unplaced."""


def names(run: tensortap.Run) -> list[str]:
    return sorted({*run.names(), *run.part_names()})


def moments(run: tensortap.Run, name: str) -> Iterator[dict[str, int]]:
    """Each microbatch; of a parameter and its gradient there is one a step."""
    whole = "/param/" in name or "/grad/" in name
    for microbatch in (0,) if whole else (0, 1):
        yield {"step": 0} if "/grad/" in name else {"step": 0, "microbatch": microbatch}


def in_order(run: tensortap.Run, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The embedding's axes of batch and sequence change places under sequence parallelism."""
    if not name.startswith("embed/") or "output" not in name:
        return tensor
    dims = next(iter(run.records(name))).dims
    assert dims in ("batch seq hidden", "seq batch hidden")
    return tensor.transpose(0, 1) if dims.startswith("batch") else tensor


def require_equal(one: Path, other: Path, *, unknown: tuple[str, ...] = (), **chosen: int) -> int:
    """Every name of one run in the other, equal but for rounding; how many tensors were equal."""
    expected, found = tensortap.open_run(one / "run"), tensortap.open_run(other / "run")
    assert names(found) == names(expected)
    assert not found.problems
    compared = 0
    for name in names(expected):
        if any(word in name for word in unknown):
            continue
        for moment in moments(expected, name):
            a = in_order(expected, name, expected.tensor(name, **moment))
            b = in_order(found, name, found.tensor(name, **moment, **chosen))
            assert a.shape == b.shape, name
            scale = a.double().abs().max().item() or 1.0
            assert (a.double() - b.double()).abs().max().item() <= ROUNDING * scale, name
            compared += 1
    return compared


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, {"tp": 2}),
        (2, {"tp": 2, "sequence_parallel": True}),
        (2, {"pp": 2}),
        (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
        (4, {"tp": 4}),
        (4, {"tp": 2, "cp": 2, "sequence_parallel": True}),
    ],
    ids=["tp", "tp-sp", "pp", "tp-sp-pp", "tp-of-four", "tp-cp-sp"],
)
def test_a_spread_model_assembles_to_the_model_in_one_process(
    launch: Launches, processes: int, options: dict[str, Any]
) -> None:
    unknown = CONTEXT if "cp" in options else ()
    assert require_equal(launch(1), launch(processes, **options), unknown=unknown) > 600


def test_fused_projections_are_served_as_their_parts(launch: Launches) -> None:
    run = tensortap.open_run(launch(2, tp=2) / "run")
    fused = run.tensor("layers.1.attn.qkv/forward/output", step=0, microbatch=0)
    groups = fused.unflatten(-1, (2, -1))  # q q k v, for each of two groups; heads of 8
    q, k, v = groups[..., :16], groups[..., 16:24], groups[..., 24:]
    for word, part in {"q": q, "k": k, "v": v}.items():
        for phase, tensor in (("forward", "output"), ("backward", "grad_output")):
            found = run.tensor(f"layers.1.attn.{word}/{phase}/{tensor}", step=0, microbatch=0)
            if phase == "forward":
                assert torch.equal(found, part.flatten(-2))
            assert found.shape == part.flatten(-2).shape
    weight = run.tensor("layers.1.mlp.gate_up/param/weight", step=0)
    for word, half in zip(("gate", "up"), weight.chunk(2), strict=True):
        assert torch.equal(run.tensor(f"layers.1.mlp.{word}/param/weight", step=0), half)
    given = run.tensor("layers.1.attn.qkv/forward/input", step=0, microbatch=0)
    assert torch.equal(run.tensor("layers.1.attn.k/forward/input", step=0, microbatch=0), given)


def test_the_core_gets_what_the_projection_made(launch: Launches) -> None:
    """Values have no rotary embedding: the core's value is the part `v` of the projection."""
    run = tensortap.open_run(launch(2, tp=2) / "run")
    at = {"step": 0, "microbatch": 1}
    value = run.tensor("layers.2.attn.core/forward/value", **at)
    assert torch.equal(value.flatten(-2), run.tensor("layers.2.attn.v/forward/output", **at))


def test_biases_query_norms_and_tied_embeddings_assemble_too(launch: Launches) -> None:
    """One group of queries over two ranks: both hold its key, each a share of its gradient."""
    options = {"kind": "biased", "tied": True, "qk_layernorm": True}
    alone = launch(1, **options)
    assert require_equal(alone, launch(2, tp=2, sequence_parallel=True, **options)) > 800
    # The tied weight is on both stages; its gradient is the sum of theirs.
    assert require_equal(alone, launch(2, pp=2, **options)) > 800


def test_context_parallel_ranks_hold_both_ends_of_the_sequence(launch: Launches) -> None:
    assert require_equal(launch(1), launch(2, cp=2), unknown=CONTEXT) > 600


def test_experts_have_global_numbers_and_their_gradients_are_sums(launch: Launches) -> None:
    """Expert against plain data parallelism: the same weights and tokens, dealt differently."""
    replicated, dealt = launch(2, kind="sparse"), launch(2, kind="sparse", ep=2)
    expected, found = (tensortap.open_run(path / "run") for path in (replicated, dealt))
    assert names(found) == names(expected)
    for name in expected.names():
        if "/grad/" in name or "/param/" in name:
            torch.testing.assert_close(
                found.tensor(name, step=0), expected.tensor(name, step=0), rtol=1e-4, atol=1e-5
            )
    assert "layers.0.mlp.experts.3.down/param/weight" in found.names()


def test_tokens_of_experts_are_not_placed_but_their_index_is_there(launch: Launches) -> None:
    run = tensortap.open_run(launch(2, kind="sparse", ep=2) / "run")
    with pytest.raises(RunError, match="placement of rank 0's piece is unknown"):
        run.tensor("layers.0.mlp.experts/forward/input", step=0, microbatch=0, dp_rank=0)
    for rank in (0, 1):
        index = run.tensor(
            "layers.0.mlp.experts/forward/token_index", step=0, microbatch=0, rank=rank
        )
        routed = run.tensor("layers.0.mlp.router/forward/output.1", step=0, microbatch=0, rank=rank)
        # Each token goes to two experts; the index lists the tokens of expert 0, 1, 2, 3 in turn.
        assert torch.equal(index, routed.T.nonzero()[:, 1])


def test_a_router_sees_its_tokens_on_every_tensor_parallel_rank(launch: Launches) -> None:
    alone = launch(1, kind="sparse")
    both = launch(2, kind="sparse", tp=2, etp=2, sequence_parallel=True)
    assert require_equal(alone, both, unknown=("experts",)) > 500


def test_data_parallel_ranks_are_apart_in_activations_and_summed_in_gradients(
    launch: Launches,
) -> None:
    alone, both = launch(1), launch(2, overlap=True)
    assert require_equal(alone, both, unknown=("/grad/",), dp_rank=0) > 600
    run = tensortap.open_run(both / "run")
    own = [run.tensor("layers.0.mlp.down/grad/weight", step=0, dp_rank=n) for n in (0, 1)]
    single = tensortap.open_run(alone / "run").tensor("layers.0.mlp.down/grad/weight", step=0)
    torch.testing.assert_close(own[0], single)
    experts = tensortap.open_run(launch(2, kind="sparse") / "run")
    gradient = "layers.0.mlp.experts.0.down/grad/weight"
    own_share = experts.tensor(gradient, step=0, dp_rank=1)
    assert not torch.equal(own_share, experts.tensor(gradient, step=0))
    total = run.tensor("layers.0.mlp.down/grad/weight", step=0)
    assert torch.equal(total, (own[0].double() + own[1].double()).float())


def test_chunks_of_a_virtual_pipeline_have_global_layers(launch: Launches) -> None:
    run = tensortap.open_run(launch(2, pp=2, vp=2) / "run")
    single = tensortap.open_run(launch(1) / "run")
    for name in single.names():
        if name.startswith(("layers.", "embed/", "final_norm/", "lm_head/")):
            for moment in moments(single, name):
                assert torch.equal(run.tensor(name, **moment), single.tensor(name, **moment)), name


def test_padding_of_the_vocabulary_is_cut_on_demand(launch: Launches) -> None:
    run = tensortap.open_run(launch(2, tp=2) / "run")
    assert run.tensor("embed/param/weight", step=0).shape == (96, 32)
    assert run.tensor("embed/param/weight", step=0, padded=False).shape == (90, 32)
    logits = run.tensor("lm_head/forward/output", step=0, microbatch=0, padded=False)
    assert logits.shape == (16, 2, 90)


def test_a_replica_that_differs_is_reported(launch: Launches) -> None:
    spoiled = launch(
        2,
        tp=2,
        spoil="decoder.layers.1.input_layernorm.weight",
        attach={"select": "layers.*.input_norm"},
    )
    run = tensortap.open_run(spoiled / "run")
    with pytest.raises(RunError, match=r"ranks 0 and 1 both hold .* largest difference is 0.5"):
        run.tensor("layers.1.input_norm/param/weight", step=0)
    assert run.tensor("layers.0.input_norm/param/weight", step=0).shape == (32,)


@pytest.mark.parametrize(
    ("select", "ranks"),
    [
        ("layers.3.mlp.down", {1}),
        ("embed/forward/input", {0}),
        ("root/forward/output,embedding/forward/output", {0, 1}),
        ("layers.*.attn.q/*", {0, 1}),
    ],
)
def test_a_selection_that_is_empty_on_one_stage_is_fine(
    launch: Launches, select: str, ranks: set[int]
) -> None:
    run = tensortap.open_run(launch(2, pp=2, attach={"select": select}) / "run")
    assert {record.at.rank for record in run.records()} == ranks
    assert run.coverage()["gaps"] == []


def test_a_selection_that_no_stage_has_is_an_error_on_all(launch: Launches) -> None:
    out = launch(2, fails=True, pp=2, attach={"select": "layers.*.mlp.dwon"})
    assert not (out / "run").exists()


def test_only_the_ranks_asked_for_are_tapped_and_the_others_do_not_wait_for_them(
    launch: Launches,
) -> None:
    """The launch itself requires equal lists of collectives with and without the tap."""
    run = tensortap.open_run(launch(2, tp=2, attach={"ranks": "1"}) / "run")
    assert {record.at.rank for record in run.records()} == {1}


def test_parameters_that_are_gathered_late_are_those_the_step_used(launch: Launches) -> None:
    """With the distributed optimizer and overlap_param_gather a step begins with old values."""
    run = tensortap.open_run(launch(2, optimizer=0.1) / "run")
    assert run.steps == [0, 1, 2]
    for layer, word in ((0, "attn.qkv"), (1, "attn.out"), (2, "mlp.gate_up"), (3, "mlp.down")):
        name = f"layers.{layer}.{word}"
        values = [run.tensor(f"{name}/param/weight", step=step) for step in run.steps]
        for step, value in enumerate(values):
            used = run.tensor(f"{name}/forward/weight", step=step, microbatch=0, dp_rank=0)
            assert torch.equal(value, used), (name, step)
        assert not torch.equal(values[0], values[1])
        assert not torch.equal(values[1], values[2])


def test_logits_that_generation_gathers_are_whole_on_every_rank(launch: Launches) -> None:
    run = tensortap.open_run(launch(2, tp=2) / "run")
    alone = tensortap.open_run(launch(1) / "run")
    found, expected = (
        one.tensor("lm_head/forward/output", step=0, eval=True) for one in (run, alone)
    )
    assert found.shape == expected.shape == (16, 2, 96)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_shared_experts_assemble_beside_the_routed_ones(launch: Launches) -> None:
    config = {"moe_shared_expert_intermediate_size": 40}
    alone = launch(1, kind="sparse", config=config)
    both = launch(2, kind="sparse", config=config, tp=2, etp=2, sequence_parallel=True)
    assert require_equal(alone, both, unknown=(".experts",)) > 500


def test_a_killed_rank_leaves_all_that_was_written(launch: Launches) -> None:
    path = launch(2, fails=True, tp=2, kill=1) / "run"
    run = tensortap.open_run(path)
    at = {"step": 0, "microbatch": 1}
    for rank in (0, 1):
        assert run.tensor("layers.3.attn.q/forward/output", rank=rank, **at).shape[-1] in (16, 32)
    whole = tensortap.open_run(launch(2, tp=2) / "run")
    for name in ("layers.3.mlp.down/forward/output", "layers.0.attn.qkv/backward/grad_output"):
        assert torch.equal(run.tensor(name, **at), whole.tensor(name, **at))


def test_a_spread_run_goes_through_the_old_files_and_back(launch: Launches, tmp_path: Path) -> None:
    run = tensortap.open_run(launch(2, tp=2) / "run")
    moved = layout("megatron-pt").export(run, tmp_path / "old", "*", lambda done: None)
    assert not moved.skipped
    layout("megatron-pt").load(
        tmp_path / "old", tensortap.RunDirectorySink(tmp_path / "back"), lambda done: None
    )
    back = tensortap.open_run(tmp_path / "back")
    assert names(back) == names(run)
    for name in names(run):
        for moment in moments(run, name):
            assert torch.equal(back.tensor(name, **moment), run.tensor(name, **moment)), name
    words = {"_".join(p.stem.split("_")[3:]) for p in (tmp_path / "old").rglob("*.pt")}
    attention = {f"attention_L0_forward_fp32_{t}" for t in ("query", "key", "value", "output")}
    forward = {f"linear_L1_forward_fp32_{t}" for t in ("input", "weight", "output")}
    backward = {f"linear_L1_backward_fp32_{t}" for t in ("input", "weight", "output")}
    assert attention | forward | backward <= words
