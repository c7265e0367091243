import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tensortap_analysis.weights import Scope
from tensortap_analysis.weights.health import health
from tensortap_analysis.weights.health.default import hidden

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def codes(scaled):
    """The nearest values of four bits, with the sign above them."""
    return (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (scaled < 0)


def halves(found):
    """Two codes in a byte, the first in its lower half."""
    return (found[..., 0::2] | (found[..., 1::2] << 4)).to(torch.uint8)


def in_nvfp4(x):
    blocks = x.view(len(x), -1, 16)
    wanted = blocks.abs().amax(-1) / 6
    whole = wanted.max() / 448
    scales = (wanted / whole).to(torch.float8_e4m3fn)
    found = codes(blocks / (scales.float() * whole).unsqueeze(-1)).view(x.shape)
    return {"weight": halves(found), "weight_scale": scales, "weight_scale_2": whole}


def in_int4(x):
    groups = x.view(len(x), -1, 128)
    scales = groups.abs().amax(-1) / 7
    found = (torch.round(groups / scales.unsqueeze(-1)).clamp(-8, 7) + 8).view(x.shape).int()
    packed = sum(found[:, at::8] << (4 * at) for at in range(8))
    return {
        "weight_packed": packed.int(),
        "weight_scale": scales.bfloat16(),
        "weight_shape": torch.tensor(x.shape),
    }


def in_mxfp4(x):
    blocks = x.view(1, len(x), -1, 32)
    powers = torch.floor(torch.log2(blocks.abs().amax(-1))) - 2
    found = codes(blocks / 2 ** powers.unsqueeze(-1))
    return {
        "mlp.experts.down_proj_blocks": halves(found),
        "mlp.experts.down_proj_scales": (powers + 127).to(torch.uint8),
    }


def in_float8(x):
    return {"weight": x.to(torch.float8_e4m3fn)}


def in_bfloat16(x):
    return {"weight": x.bfloat16()}


STORED = [in_nvfp4, in_int4, in_mxfp4, in_float8, in_bfloat16]


def issues(tmp_path, tensors, rule="rank"):
    state = {f"layers.0.q.{name}": one.contiguous() for name, one in tensors.items()}
    save_file(state, tmp_path / "x.safetensors")
    report = health(Scope(tmp_path / "x.safetensors").scan())
    return [issue for issue in report.at_least("info") if rule in (None, issue.rule)]


def random(n, rank=None):
    torch.manual_seed(0)
    if rank is None:
        return torch.randn(n, n)
    return torch.randn(n, rank) @ torch.randn(rank, n) / rank**0.5


@pytest.mark.parametrize("store", STORED)
def test_a_healthy_matrix_has_the_rank_that_its_storage_can_show(tmp_path, store):
    assert issues(tmp_path, store(random(256)), rule=None) == []


@pytest.mark.parametrize("store", STORED)
def test_singular_values_that_fall_off_as_training_makes_them_are_no_missing_rank(tmp_path, store):
    q1, q2 = (torch.linalg.qr(random(256) + n)[0] for n in (0.1, 0.2))
    falling = q1 * torch.linspace(3, 0.0, 257)[:256] @ q2
    assert issues(tmp_path, store(falling * 5)) == []


@pytest.mark.parametrize("store", STORED)
@pytest.mark.parametrize(("rank", "severity"), [(3, "warning"), (100, "info")])
def test_a_missing_rank_is_found_below_the_rounding_of_any_storage(tmp_path, store, rank, severity):
    [issue] = issues(tmp_path, store(random(256, rank)))
    assert issue.severity == severity
    assert "of 256: " in issue.cause
    assert "directions carry nothing" in issue.cause


def test_a_rank_that_collapsed_fails_a_check_for_warnings(tmp_path):
    [issue] = issues(tmp_path, {"weight": random(64, 3)})
    assert (issue.severity, issue.value) == ("warning", pytest.approx(3 / 64, rel=1e-3))
    assert issue.cause.startswith("Its rank is 3 of 64: 61 directions carry nothing")


def test_a_table_of_positions_by_sines_is_only_noted(tmp_path):
    angles = torch.outer(torch.arange(500.0), 1e-4 ** torch.linspace(0, 1, 128))
    x = torch.cat([angles.sin(), angles.cos()], 1)
    save_file({"embed_positions.weight": x}, tmp_path / "x.safetensors")
    report = health(Scope(tmp_path / "x.safetensors").scan())
    assert report.at_least("warning") == []
    assert "rank" in [issue.rule for issue in report.issues["info"]]


def test_all_zero_rows_are_no_missing_rank_for_they_have_their_own_rule(tmp_path):
    x = random(64)
    x[:20] = 0
    assert issues(tmp_path, {"weight": x}) == []
    x[44:] = x[20:40].clone()
    [issue] = issues(tmp_path, {"weight": x})
    assert issue.severity == "info"


@pytest.mark.parametrize("shape", [(256, 256), (256, 128), (100, 1000)])
@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.7, 1.0])
def test_what_hides_below_a_tolerance_is_what_random_matrices_have_there(shape, tolerance):
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(8):
        s = np.linalg.svd(rng.standard_normal(shape), compute_uv=False)
        draws.append(np.mean(s < tolerance * np.sqrt(np.mean(s**2))))
    assert hidden(tolerance, *shape) == pytest.approx(np.mean(draws), abs=0.02)
