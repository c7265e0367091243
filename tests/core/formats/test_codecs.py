"""What every format promises, whatever the shape, layout, dtype and axis."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.core.formats.values import assert_same

from tensortap import formats
from tensortap.errors import ConfigError

each = pytest.mark.parametrize("name", formats.names())
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.float8_e5m2,
]  # fmt: skip


def tensors() -> list[tuple[torch.Tensor, int]]:
    """Tensors of all sorts of layout, and an axis of each."""
    x = torch.randn(7, 5, 100) * torch.randn(7, 5, 100).exp()
    return [
        (x, -1), (x, 0), (x, 1), (x[0, 0, 0], -1), (x[0, 0, 0], 0), (x[:0], -1), (x[:, :, :0], -1),
        (x[:, :, :0], 1), (x.transpose(0, 2), 0), (x.permute(1, 2, 0), 1), (x[::2, :, 3:77:3], 2),
        (x[:, :1].expand(7, 4, 100), 2), (x.flip(0), -2), (x[0], -1), (x[0].t(), 0), (x[0].t(), 1),
        (torch.randn(2, 600)[:, 1:545], 1), (torch.randn(300, 3), 0),
    ]  # fmt: skip


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_quantising_is_quantising_and_dequantising(name: str, dtype: torch.dtype) -> None:
    codec = formats.get(name)
    for x, axis in tensors():
        cast = x.to(dtype)
        found, quantized = codec.fake_quantize(cast, axis), codec.quantize(cast, axis)
        assert (found.shape, found.dtype) == (cast.shape, dtype)
        assert quantized.codes.shape == cast.shape
        values = codec.dequantize(quantized)
        assert values.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert_same(found, values.to(dtype))


@each
def test_layout_and_axis_change_no_value(name: str) -> None:
    codec = formats.get(name)
    for x, axis in tensors():
        plain = codec.fake_quantize(x.contiguous(), axis)
        assert_same(codec.fake_quantize(x, axis), plain)
        if x.dim() > 1:
            turned = x.movedim(axis, 0).contiguous()
            assert_same(codec.fake_quantize(turned, 0).movedim(0, axis), plain)


@pytest.mark.parametrize(
    "name", [name for name in formats.names() if name not in ("nvfp4", "int8", "int4")]
)
def test_values_on_the_grid_stay_where_they_are(name: str) -> None:
    """Where scales are powers of two; others can move by a last place."""
    codec = formats.get(name)
    once = codec.fake_quantize(torch.randn(3, 200))
    assert_same(codec.fake_quantize(once), once)


@each
def test_the_tensor_and_its_graph_are_left_alone(name: str) -> None:
    codec = formats.get(name)
    x = torch.randn(4, 64, requires_grad=True)
    before = x.detach().clone()
    found = codec.fake_quantize(x)
    assert not found.requires_grad
    assert found.data_ptr() != x.data_ptr()
    found.zero_()
    assert torch.equal(x.detach(), before)
    on_grid = codec.fake_quantize(before)
    again = codec.fake_quantize(on_grid)
    assert again.data_ptr() != on_grid.data_ptr()


@each
def test_negated_views_are_read_as_what_they_mean(name: str) -> None:
    x = torch.complex(torch.randn(40), torch.randn(40)).conj().imag
    assert x.is_neg()
    codec = formats.get(name)
    assert_same(codec.fake_quantize(x), codec.fake_quantize(x.resolve_neg().clone()))


@each
def test_nothing_depends_on_values_the_host_would_have_to_wait_for(name: str) -> None:
    """A meta tensor has none: whatever asked for one would raise."""
    x = torch.empty(4, 50, device="meta", dtype=torch.bfloat16)
    codec = formats.get(name)
    for axis in (0, 1):
        found = codec.fake_quantize(x, axis)
        assert (found.device.type, found.shape, found.dtype) == ("meta", x.shape, x.dtype)
        assert codec.dequantize(codec.quantize(x, axis)).shape == x.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each
def test_a_gpu_gives_the_values_of_the_cpu(name: str) -> None:
    codec = formats.get(name)
    for x, axis in tensors():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            cast = x.to(dtype)
            device = cast.cuda()
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = codec.fake_quantize(device, axis)
                quantized = codec.quantize(device, axis)
                values = codec.dequantize(quantized).to(dtype)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            wanted = codec.fake_quantize(cast, axis)
            assert_same(found.cpu(), wanted)
            assert_same(values.cpu(), wanted)


@each
def test_integers_and_axes_that_are_not_there_are_said(name: str) -> None:
    codec = formats.get(name)
    with pytest.raises(ConfigError, match=r"int64 tensor cannot be quantised"):
        codec.fake_quantize(torch.arange(4))
    with pytest.raises(ConfigError, match=r"complex64 tensor cannot be quantised"):
        codec.quantize(torch.zeros(4, dtype=torch.complex64))
    if codec.block is not None:
        with pytest.raises(ConfigError, match=r"axis=2 is not one of the 2 axes"):
            codec.quantize(torch.zeros(2, 2), axis=2)


def test_codes_of_another_format_are_refused() -> None:
    quantized = formats.get("mxfp4").quantize(torch.ones(4))
    with pytest.raises(ConfigError, match="codes of mxfp4, not of nvfp4"):
        formats.get("nvfp4").dequantize(quantized)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4", "int4"])
def test_scales_that_are_not_those_of_the_codes_are_refused(name: str) -> None:
    codec = formats.get(name)
    good = codec.quantize(torch.randn(4, 256))
    assert good.scales is not None
    short, elsewhere = good.scales[:, :1], good.scales.to("meta")
    with pytest.raises(ConfigError, match=r"codes of \(4, 256\) .* need scales of \(4, "):
        codec.dequantize(dataclasses.replace(good, scales=short))
    with pytest.raises(ConfigError, match="codes are on cpu, their scales on meta"):
        codec.dequantize(dataclasses.replace(good, scales=elsewhere))
    with pytest.raises(ConfigError, match=r"codes of \(2, 256\) for a tensor of \(4, 256\)"):
        codec.dequantize(dataclasses.replace(good, codes=good.codes[:2]))
    with pytest.raises(ConfigError, match="have no values"):
        codec.dequantize(dataclasses.replace(good, scales=None))


def test_codes_without_their_one_scale_are_refused() -> None:
    for name, field in (("int8", "scales"), ("nvfp4", "tensor_scale")):
        codec = formats.get(name)
        bare = dataclasses.replace(codec.quantize(torch.randn(32)), **{field: None})
        with pytest.raises(ConfigError, match="have no values without"):
            codec.dequantize(bare)


def test_quantised_data_is_frozen() -> None:
    quantized = formats.get("mxfp4").quantize(torch.ones(4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantized.axis = 1  # type: ignore[misc]


def test_an_unknown_format_lists_the_known_ones_the_nearest_first() -> None:
    with pytest.raises(ConfigError) as error:
        formats.get("mxfp5")
    message = str(error.value)
    assert all(name in message for name in formats.names())
    assert message.index("mxfp4") < message.index("hifp8")


def test_unknown_options_and_values_name_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"no option 'mode'; it has: rounding, overflow"):
        formats.get("hifp8", mode="ta")
    with pytest.raises(ConfigError, match=r"no option 'rounding'; it has: none"):
        formats.get("mxfp4", rounding="ta")
    with pytest.raises(ConfigError, match=r"rounding='even' cannot be used; it is 'ta' or 'hybr"):
        formats.get("hifp8", rounding="even")
    for group in (0, -32, 1.5, True, "32"):
        with pytest.raises(ConfigError, match=r"group=.* it is a positive integer"):
            formats.get("int4", group=group)


@each
def test_a_record_can_say_the_format(name: str) -> None:
    codec = formats.get(name)
    assert codec.name == codec.info.name == name
    assert codec.info.block == codec.block
    assert codec.info.rounding == ("ta" if name == "hifp8" else "nearest-even")


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4"])
@pytest.mark.parametrize("length", [1, 64, 65])
def test_four_bit_codes_pack_two_a_byte(name: str, length: int) -> None:
    codes = formats.get(name).quantize(torch.randn(3, length)).codes
    packed = formats.pack(codes)
    assert packed.shape == (3, -(-length // 2))
    assert torch.equal(formats.unpack(packed, length), codes)


def test_only_four_bit_codes_are_packed() -> None:
    with pytest.raises(ConfigError, match="uint8"):
        formats.pack(torch.zeros(4))


def test_the_table_says_what_the_codecs_do() -> None:
    rows = {row.name: row for row in formats.table()}
    assert tuple(rows) == formats.names()
    for name, row in rows.items():
        codec = formats.get(name)
        assert row.block == codec.block
        if row.smallest_subnormal is None:
            continue
        x = torch.tensor(
            [row.max, row.smallest_normal, row.smallest_subnormal], dtype=torch.float64
        )
        # The scale of a block that holds the largest value is 1; nvfp4 fills its block scale first.
        x = x * 448 if name == "nvfp4" else x
        assert codec.fake_quantize(x).tolist() == x.tolist()
        x[2] /= 2.01
        assert codec.fake_quantize(x).tolist()[2] == 0.0
