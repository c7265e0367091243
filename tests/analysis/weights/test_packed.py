import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.analysis.weights.checkpoints import read, reasons, safetensors_folder
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tensortap_analysis.weights import CheckpointError, Scope

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def saved(folder, state, **quantization):
    config = {"quantization_config": quantization} if quantization else None
    return safetensors_folder(folder / "m", state, config=config)


def only(folder):
    [(name, values)] = read(folder).items()
    return name, values


@pytest.mark.parametrize("shape", [(256, 384), (200, 130), (128, 128), (1, 300)])
@pytest.mark.parametrize("configured", [False, True])
def test_float8_with_scales_of_blocks_gives_the_values(tmp_path, shape, configured):
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 0.5
    quantization = {"weight_block_size": [128, 128]} if configured else {}
    folder = saved(tmp_path, {"x.weight": codes, "x.weight_scale_inv": scales}, **quantization)
    name, values = only(folder)
    wanted = codes.float().numpy().copy()
    for i in range(shape[0]):
        for j in range(0, shape[1]):
            wanted[i, j] *= scales[i // 128, j // 128].item()
    assert name == "x.weight"
    np.testing.assert_array_equal(values.numpy(), wanted)
    [weight] = Scope(folder).source.weights
    assert weight.dtype == torch.float8_e4m3fn
    assert weight.note == "codes times weight_scale_inv"


@pytest.mark.parametrize("scale_shape", [(), (1,), (6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2])
def test_scales_of_a_tensor_or_a_row_multiply_codes(tmp_path, scale_shape, dtype):
    codes = torch.randint(-100, 100, (6, 4)).to(dtype)
    scale = torch.rand(scale_shape) + 0.5
    state = {"x.weight": codes, "x.weight_scale": scale, "x.input_scale": torch.ones(())}
    _, values = only(saved(tmp_path, state))
    rows = scale.double().numpy().reshape(-1, 1)
    np.testing.assert_allclose(values.numpy(), codes.double().numpy() * rows, rtol=1e-6)
    assert reasons(tmp_path / "m") == {
        "x.weight_scale": "belongs to x.weight", "x.input_scale": "belongs to x.weight"
    }  # fmt: skip


def test_zero_points_are_subtracted_first(tmp_path):
    codes, scale = torch.randint(-128, 128, (6, 4), dtype=torch.int8), torch.rand(6, 1)
    zero = torch.randint(-10, 10, (6, 1), dtype=torch.int8)
    state = {"x.weight": codes, "x.weight_scale": scale, "x.weight_zero_point": zero}
    _, values = only(saved(tmp_path, state))
    torch.testing.assert_close(values, (codes.float() - zero.float()) * scale)


def test_rows_of_bitsandbytes_int8_are_scaled_by_their_largest(tmp_path):
    x = torch.randn(6, 40)
    largest = x.abs().amax(1)
    codes = (x / largest[:, None] * 127).round().to(torch.int8)
    state = {
        "x.weight": codes,
        "x.SCB": largest,
        "x.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    _, values = only(saved(tmp_path, state))
    assert (values - x).abs().max() <= largest.max() / 127 / 2 * 1.001


def test_stacks_of_float8_experts_have_a_scale_each_and_come_one_by_one(tmp_path):
    codes = torch.randn(3, 128, 256).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 1, 2) + 0.5
    state = {"mlp.experts.down_proj": codes, "mlp.experts.down_proj_scale_inv": scales}
    folder = saved(tmp_path, state)
    [weight] = Scope(folder).source.weights
    matrices = list(weight.matrices())
    for index in range(3):
        wanted = codes[index].float() * scales[index].repeat_interleave(128, 1)
        assert torch.equal(matrices[index], wanted)
    assert torch.equal(weight.read(), torch.stack(matrices))


def test_scales_that_do_not_fit_are_an_error_that_names_both_shapes(tmp_path):
    state = {"x.weight": torch.ones(6, 4).to(torch.float8_e4m3fn), "x.weight_scale": torch.ones(5)}
    [weight] = Scope(saved(tmp_path, state)).source.weights
    with pytest.raises(Exception, match=r"scales of shape \(5,\) do not fit codes of \(6, 4\)"):
        weight.read()


def test_mxfp4_of_gpt_oss_is_what_transformers_reads(tmp_path):
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, 6, 3), dtype=torch.uint8)
    state = {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}
    name, values = only(saved(tmp_path, state))
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert name == "mlp.experts.down_proj"
    assert torch.equal(values.transpose(1, 2), wanted)


@pytest.mark.parametrize("tool", ["compressed-tensors", "modelopt"])
def test_nvfp4_gives_the_values(tmp_path, tool):
    codes = torch.randint(0, 16, (6, 32))
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    scales = (torch.rand(6, 2) + 0.5).to(torch.float8_e4m3fn)
    whole = 0.25
    if tool == "modelopt":
        state = {
            "x.weight": packed,
            "x.weight_scale": scales,
            "x.weight_scale_2": torch.tensor(whole),
        }
    else:
        state = {
            "x.weight_packed": packed,
            "x.weight_scale": scales,
            "x.weight_global_scale": torch.tensor([1 / whole]),
        }
    name, values = only(saved(tmp_path, state))
    wanted = E2M1[codes.numpy()] * scales.float().repeat_interleave(16, 1).numpy() * whole
    assert name == "x.weight"
    np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_of_compressed_tensors_give_the_values(tmp_path, bits):
    codes = torch.randint(0, 1 << bits, (5, 64))
    packed = words(codes, bits)
    scales = torch.rand(5, 2) + 0.5
    state = {
        "x.weight_packed": packed,
        "x.weight_scale": scales,
        "x.weight_shape": torch.tensor([5, 64]),
    }
    groups = {"group_0": {"weights": {"num_bits": bits}}}
    name, values = only(saved(tmp_path, state, config_groups=groups))
    wanted = (codes.numpy() - 2 ** (bits - 1)) * scales.repeat_interleave(32, 1).numpy()
    assert name == "x.weight"
    np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-6)


def words(codes, bits):
    """Rows of unsigned codes as words of 32 bits, the first code lowest."""
    many = codes.numpy().astype(np.uint64).reshape(len(codes), -1, 32 // bits)
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    return torch.from_numpy((many << shifts).sum(-1).astype(np.uint32).view(np.int32))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("permuted", [False, True])
def test_gptq_gives_the_values_as_out_in(tmp_path, version, permuted):
    inputs, out, groups = 64, 16, 4
    codes = torch.randint(0, 16, (inputs, out))
    zeros = torch.randint(1, 16, (groups, out))
    scales = (torch.rand(groups, out) + 0.5).half()
    group = torch.arange(inputs) // (inputs // groups)
    if permuted:
        group = group[torch.randperm(inputs)]
    state = {
        "x.qweight": words(codes.T.contiguous(), 4).T.contiguous(),
        "x.qzeros": words(zeros - int(version == "gptq"), 4),
        "x.scales": scales,
        "x.g_idx": group.int(),
    }
    folder = saved(tmp_path, state, quant_method="gptq", bits=4, checkpoint_format=version)
    name, values = only(folder)
    wanted = np.empty((out, inputs), np.float32)
    for i in range(inputs):
        g = group[i]
        wanted[:, i] = (codes[i] - zeros[g]).numpy() * scales[g].float().numpy()
    assert name == "x.weight"
    np.testing.assert_array_equal(values.numpy(), wanted)


def test_awq_gives_the_values_as_out_in(tmp_path):
    inputs, out, groups = 32, 16, 2
    codes, zeros = torch.randint(0, 16, (inputs, out)), torch.randint(0, 16, (groups, out))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    scales = torch.rand(groups, out) + 0.5

    def packed(numbers):
        return words(numbers.view(len(numbers), -1, 8)[..., order].flatten(1), 4)

    state = {"x.qweight": packed(codes), "x.qzeros": packed(zeros), "x.scales": scales}
    _, values = only(saved(tmp_path, state, quant_method="awq", bits=4))
    group = torch.arange(inputs) // (inputs // groups)
    wanted = ((codes - zeros[group]).float() * scales[group]).T
    assert torch.equal(values, wanted)


def test_what_cannot_be_decoded_is_left_out_with_the_reason(tmp_path):
    state = {
        "a.weight": torch.zeros(32, 1, dtype=torch.uint8),
        "a.weight.absmax": torch.ones(4),
        "a.weight.quant_map": torch.ones(16),
        "b.qweight": torch.zeros(4, 4, dtype=torch.int32),
        "c.weight": torch.zeros(4, 4, dtype=torch.int8),
        "d.weight": torch.ones(2, 2),
    }
    save_file(state, tmp_path / "x.safetensors")
    why = reasons(tmp_path / "x.safetensors")
    assert set(read(tmp_path / "x.safetensors")) == {"d.weight"}
    assert "packed by bitsandbytes" in why["a.weight"]
    assert why["a.weight.absmax"] == "belongs to a.weight"
    assert why["b.qweight"] == "qweight without qzeros and scales"
    assert "int8 without scales" in why["c.weight"]


def test_float8_without_scales_is_measured_as_it_is(tmp_path):
    codes = torch.randn(8, 8).to(torch.float8_e4m3fn)
    _, values = only(saved(tmp_path, {"x.weight": codes}))
    assert values.dtype == torch.float8_e4m3fn


def gptq(**damaged):
    state = {
        "x.qweight": torch.randint(0, 2**20, (4, 8), dtype=torch.int32),
        "x.qzeros": torch.zeros(2, 1, dtype=torch.int32),
        "x.scales": torch.ones(2, 8),
        "x.g_idx": torch.arange(32, dtype=torch.int32) // 16,
    }
    return state | {f"x.{name}": tensor for name, tensor in damaged.items()}


@pytest.mark.parametrize(
    "damaged",
    [
        {"g_idx": torch.full((32,), 99, dtype=torch.int32)},
        {"qzeros": torch.zeros(0, 1, dtype=torch.int32)},
        {"scales": torch.ones(6)},
        {"scales": torch.ones(0, 8)},
    ],
)
def test_damaged_codes_are_told_with_their_name(tmp_path, damaged):
    folder = saved(tmp_path, gptq(**damaged), quant_method="gptq", bits=4)
    with pytest.raises(CheckpointError, match=r"^x.* do not belong together \("):
        Scope(folder).scan("norms")


def test_the_same_codes_are_read_where_they_are_whole(tmp_path):
    [weight] = Scope(saved(tmp_path, gptq(), quant_method="gptq", bits=4)).source.weights
    assert weight.read().shape == (8, 32)
