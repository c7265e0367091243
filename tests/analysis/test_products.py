"""Products with a weight: what they make of an error is measured, where the values say they are."""

from __future__ import annotations

import pytest
import torch
from tests.core.store.building import record, write_run

from tensortap_analysis import compare
from tensortap_analysis.divergence import products


def passed_of(tmp_path, ref, run, **fields):
    """What is said of the last tensor of two runs of `(name, tensor)` rows."""
    paths = []
    for word, rows in (("ref", ref), ("run", run)):
        made = [(record(n, t, seq, **fields.get(n, {})), t) for seq, (n, t) in enumerate(rows)]
        paths.append(write_run(tmp_path / word, made))
    [found] = compare(*paths).runs
    return found.pairs[-1].passed


def test_a_bias_that_is_handed_on_is_no_part_of_the_product(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*size, generator=generator) for size in ((40, 16), (8, 16), (8,)))

    def rows(x, off=0.0):
        return [
            ("layers.0.mlp.up/param/weight", w), ("layers.0.mlp.up/param/bias", 3 * b),
            ("layers.0.mlp.up/forward/input", x),
            ("layers.0.mlp.up/forward/output", x @ w.T * (1 + off)),
        ]  # fmt: skip

    near = x + 0.1 * torch.randn(40, 16, generator=generator)
    passed = passed_of(tmp_path, rows(x), rows(near, off=0.01))
    assert passed.local == pytest.approx(0.01, rel=0.05)
    assert passed.inherited == pytest.approx(0.1, rel=0.15)


def test_what_is_no_product_is_not_taken_for_one(tmp_path):
    x, w = torch.randn(40, 16), torch.randn(16, 16)

    def run_of(path, x):
        rows = [
            ("layers.0.mixer/param/weight", w), ("layers.0.mixer/forward/input", x),
            ("layers.0.mixer/forward/output", torch.tanh(x) + 1),
        ]  # fmt: skip
        return write_run(path, [(record(n, t, seq), t) for seq, (n, t) in enumerate(rows)])

    [found] = compare(run_of(tmp_path / "a", x), run_of(tmp_path / "b", x * 1.1)).runs
    assert found.pairs[-1].passed is None
    assert found.divergences[-1].basis == "expected"


@pytest.mark.parametrize("dims", ["out in", "in out", None])
def test_weights_are_taken_as_they_are_stored(tmp_path, dims):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, generator=generator) for size in ((2, 20, 16), (16, 16)))
    near = x + 0.1 * torch.randn(2, 20, 16, generator=generator)

    def rows(x, off=0.0):
        matrix = w if dims == "in out" else w.T
        return [
            ("layers.0.mlp.up/param/weight", w), ("layers.0.mlp.up/forward/input", x),
            ("layers.0.mlp.up/forward/output", x @ matrix * (1 + off)),
        ]  # fmt: skip

    fields = {"layers.0.mlp.up/param/weight": {"dims": dims}}
    passed = passed_of(tmp_path, rows(x), rows(near, off=0.02), **fields)
    assert passed.local == pytest.approx(0.02, rel=0.05)
    assert passed.inherited == pytest.approx(0.1, rel=0.15)


def test_batch_first_and_sequence_first_are_one_product(tmp_path):
    x, w = torch.randn(3, 20, 16), torch.randn(8, 16)
    names = [f"layers.0.mlp.up/forward/{word}" for word in ("input", "output")]

    def run_of(path, x, dims, swap):
        rows = [("layers.0.mlp.up/param/weight", w, "out in")]
        rows += [
            (name, t.transpose(0, 1).contiguous() if swap else t, dims)
            for name, t in zip(names, (x, x @ w.T), strict=True)
        ]
        return write_run(
            path, [(record(n, t, seq, dims=d), t) for seq, (n, t, d) in enumerate(rows)]
        )

    ref = run_of(tmp_path / "ref", x, "batch seq hidden", False)
    run = run_of(tmp_path / "run", x + 0.1 * torch.randn(3, 20, 16), "seq batch hidden", True)
    [found] = compare(ref, run).runs
    passed = found.pairs[-1].passed
    assert passed.local < 1e-6
    assert passed.inherited == pytest.approx(found.pairs[-1].error, rel=1e-6)


@pytest.mark.parametrize("out", [1, 300_000])
def test_of_narrow_and_wide_outputs_only_so_much_is_read(tmp_path, monkeypatch, out):
    read = []
    generator = torch.Generator().manual_seed(0)
    rows, width = (2**17, 16) if out == 1 else (8, 16)
    x = torch.randn(rows, width, generator=generator)
    w = torch.randn(out, width, generator=generator)
    near = x + 0.1 * torch.randn(rows, width, generator=generator)

    def tensors(x):
        return [
            ("head/param/weight", w), ("head/forward/input", x), ("head/forward/output", x @ w.T)
        ]  # fmt: skip

    whole = products._Both.read

    def counted(self, box):
        found = whole(self, box)
        read.append(found.numel() // 2)
        return found

    monkeypatch.setattr(products._Both, "read", counted)
    passed = passed_of(tmp_path, tensors(x), tensors(near))
    assert passed.local < 1e-6
    assert passed.inherited == pytest.approx(0.1, rel=0.15)
    assert sum(read) < 4 * products._ELEMENTS
