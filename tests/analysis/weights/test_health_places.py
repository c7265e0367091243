"""Issues say where: which rows, columns and values, and of which expert."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tensortap_analysis.weights import Scope
from tensortap_analysis.weights.digits import below
from tensortap_analysis.weights.health import health


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def issues(tmp_path, name, x, **others):
    state = {f"{name}.weight": x, **others}
    save_file(state, tmp_path / "x.safetensors")
    found = health(Scope(tmp_path / "x.safetensors").scan())
    return {issue.rule: issue for issue in found.at_least("info") if issue.layer == name}


def test_dead_rows_and_columns_are_named(tmp_path):
    x = torch.randn(64, 64)
    x[[3, 17, 20, 21, 40, 60]] = 0
    x[:, 9] = 0
    found = issues(tmp_path, "x", x)
    assert "6 of 64 rows are all 0 (3, 17, 20, 21 and 2 more):" in found["dead rows"].cause
    assert "1 of 64 columns is all 0 (9):" in found["dead columns"].cause


def test_copied_rows_are_named_with_what_they_copy(tmp_path):
    x = torch.randn(64, 64)
    x[7] = x[3]
    assert "(7 as 3)" in issues(tmp_path, "x", x)["copied rows"].cause


def test_the_expert_of_a_dead_row_is_named(tmp_path):
    x = torch.randn(4, 64, 64)
    x[2, 9] = 0
    found = issues(tmp_path, "mlp.experts.down_proj", x)
    assert "(9 of expert 2)" in found["dead rows"].cause


@pytest.mark.parametrize("shrunk", [1e-6, 3e-5])
def test_a_row_that_all_but_vanished_is_named(tmp_path, shrunk):
    x = torch.randn(688, 256) * 0.02
    x[17] *= shrunk
    found = issues(tmp_path, "x", x)["faint rows"]
    assert found.severity == "info"
    assert "1 of 688 rows is shorter than 1/10,000 of the median row (17)" in found.cause


def test_many_rows_that_all_but_vanished_warn_but_those_of_an_embedding_do_not(tmp_path):
    x = torch.randn(40, 64)
    x[:10] *= 1e-6
    assert issues(tmp_path, "x", x)["faint rows"].severity == "warning"
    assert issues(tmp_path, "embed_tokens", x)["faint rows"].severity == "info"


def test_rows_of_any_usual_lengths_are_not_faint(tmp_path):
    x = torch.randn(64, 64) * torch.logspace(0, -3, 64)[:, None]
    assert "faint rows" not in issues(tmp_path, "x", x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_extreme_value_is_a_warning_and_named(tmp_path, dtype):
    x = (torch.randn(256, 256) * 0.02).to(dtype)
    x[3, 200] = -30
    found = issues(tmp_path, "x", x)
    others = x.double().numpy().copy()
    others[3, 200] = 0
    times = 30 / np.sqrt((others**2).sum() / (others.size - 1))
    assert found["value"].severity == "warning"
    assert found["value"].value == pytest.approx(times, rel=1e-3)
    assert "Value [3, 200] is 30 in magnitude" in found["value"].cause
    assert "Value [3, 200]" in found["sqnr_tensor"].cause


def test_the_heavy_tails_of_trained_weights_are_no_extreme_values(tmp_path):
    x = torch.from_numpy(np.random.default_rng(0).standard_t(4, (256, 256))).float()
    assert "value" not in issues(tmp_path, "x", x)


@pytest.mark.parametrize(
    ("value", "printed"), [(29.976, "29.98"), (29.9996, "29.9996"), (21.4, "21.4"), (29.94, "29.9")]
)
def test_a_number_that_is_just_below_its_limit_is_printed_below_it(value, printed):
    assert below(value, 30.0) == printed


def test_no_format_is_advised_that_is_no_better(tmp_path):
    x = torch.randn(32, 1024)
    x[:, 7] = 40
    result = Scope(_saved(tmp_path, x)).scan()
    [issue] = [one for one in health(result).at_least("warning") if one.rule == "sqnr"]
    formats = result["x"]["quantization"]["formats"]
    better = [name for name, db in formats.items() if db >= 30 and name not in ("fp16", "bf16")]
    assert bool(better) == ("Enough is left by" in issue.remedy)
    for name in set(formats) - {"bf16"}:
        assert (f" {name}" in issue.remedy) == (name in better)


def _saved(tmp_path, x):
    save_file({"x.weight": x}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_an_ill_conditioned_matrix_is_named_though_a_row_of_it_is_dead(tmp_path):
    q1, q2 = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    x = q1 * torch.logspace(0, -9, 64, dtype=torch.float64) @ q2
    alone = issues(tmp_path, "x", x.clone())["condition"].value
    x[5] = 0
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    found = issues(tmp_path, "x", x)
    assert found["condition"].value == pytest.approx(s[0] / s[-2], rel=1e-3)
    assert found["condition"].value < alone * 10
    assert "dead rows" in found


def test_an_ill_conditioned_expert_is_named_though_another_has_a_dead_row(tmp_path):
    stack = torch.randn(4, 64, 64, dtype=torch.float64)
    stack[2, 5] = 0
    assert "condition" not in issues(tmp_path, "mlp.experts.w", stack)
    q1, q2 = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    stack[1] = q1 * torch.logspace(0, -9, 64, dtype=torch.float64) @ q2
    found = issues(tmp_path, "mlp.experts.w", stack)
    assert found["condition"].value == pytest.approx(1e9, rel=0.1)


def test_a_dead_expert_is_told_once(tmp_path):
    x = torch.randn(4, 64, 64)
    x[2] = 0
    assert set(issues(tmp_path, "mlp.experts.w", x)) == {"dead experts"}
    x[1, 3] = 0
    found = issues(tmp_path, "mlp.experts.w", x)
    assert "1 of 256 rows is all 0:" in found["dead rows"].cause


def test_the_place_of_a_value_is_that_in_the_stored_tensor(tmp_path):
    x = torch.randn(64, 192) * 0.02  # [in, out], as GPT-2's
    x[3, 100] = 30
    found = issues(tmp_path, "c_attn", x, **{"c_attn.bias": torch.zeros(192)})
    assert "Value [3, 100] is 30" in found["value"].cause


def test_a_layer_that_is_large_for_one_value_has_not_exploded(tmp_path):
    state = {f"layers.{n}.q.weight": torch.randn(64, 64) * 0.02 for n in range(6)}
    x = state.pop("layers.3.q.weight")
    x[3, 17] = 30
    found = issues(tmp_path, "layers.3.q", x, **state)
    assert "it has grown in a few places. Value [3, 17] is 30" in found["norm"].cause
    assert found["norm"].remedy == found["value"].remedy
