"""The configuration beside a compiled model: written in one go, compared before it is loaded."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from tensortap.errors import ConfigError, NotSupported
from tensortap_neuron import traced
from tensortap_neuron.traced.capture import FILE
from tensortap_neuron.traced.described import Facts
from tensortap_neuron.traced.layers import Lies

CAPTURE = traced.Capture(
    names={"layers.0": "layers.0", "norm": "final_norm"},
    select="layers.*,final_norm",
    manual=("embed/forward/x",),
    facts=Facts(
        model_type="llama",
        layers=2,
        configured=True,
        tp=4,
        lies={"norm": Lies("whole", "sequence")},
    ),
)


def test_a_capture_survives_being_saved(tmp_path):
    path = CAPTURE.save(tmp_path / "compiled")
    assert path == tmp_path / "compiled" / FILE
    assert traced.Capture.load(tmp_path / "compiled") == CAPTURE
    CAPTURE.check(tmp_path / "compiled")
    assert json.loads(path.read_text())["version"] == 1


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    CAPTURE.save(tmp_path)
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(ConfigError, match="No space left"):
        dataclasses.replace(CAPTURE, moe=True).save(tmp_path)
    assert traced.Capture.load(tmp_path) == CAPTURE
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"names": {**CAPTURE.names, "lm_head": "lm_head"}}, "modules: lm_head is not in it"),
        ({"names": {"norm": "final_norm"}}, "modules: it also has layers.0"),
        (
            {"names": {"norm": "final_norm", "layers.0": "layers.0"}},
            "modules come in another order",
        ),
        ({"inputs": True}, "capture_inputs is True here and False there"),
        ({"moe": True}, "MoE auto-capture is True here"),
        ({"manual": ()}, "by hand: it also has embed/forward/x"),
        ({"facts": dataclasses.replace(CAPTURE.facts, tp=8)}, "tp_degree is 8 here and 4 there"),
        ({"facts": dataclasses.replace(CAPTURE.facts, layers=3)}, "number of layers is 3 here"),
    ],
)
def test_what_differs_is_named_with_what_to_do(tmp_path, changes, said):
    CAPTURE.save(tmp_path)
    with pytest.raises(ConfigError) as raised:
        dataclasses.replace(CAPTURE, **changes).check(tmp_path)
    assert said in str(raised.value)
    assert "compile it again" in str(raised.value)
    assert "Capture.load" in str(raised.value)


def test_what_one_side_does_not_know_is_not_compared(tmp_path):
    """A capture prepared from a checkpoint alone knows no tp_degree."""
    CAPTURE.save(tmp_path)
    dataclasses.replace(CAPTURE, facts=Facts(layers=2)).check(tmp_path)


def test_a_selection_is_not_compiled_and_may_differ(tmp_path):
    CAPTURE.save(tmp_path)
    narrowed = traced.Capture.load(tmp_path).narrowed("layers.0/forward/output")
    narrowed.check(tmp_path)
    assert narrowed.modules == CAPTURE.modules


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "not compiled with a capture of tensortap"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"version": 2}', "version 2; this tensortap reads 1"),
        ('{"version": 1}', "cannot be read"),
        ('{"version": 1, "modules": ["a"], "select": "*"}', "cannot be read"),
    ],
)
def test_a_file_that_is_missing_or_no_capture_says_to_compile_again(tmp_path, content, said):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=said):
        traced.Capture.load(tmp_path)


def edited(tmp_path, change):
    path = CAPTURE.save(tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["facts"].update(layers="3"), "layers is '3'"),
        (lambda c: c["facts"].update(tp=0), "tp is 0"),
        (lambda c: c["facts"].update(options=[]), r"options is \[\]"),
        (lambda c: c["facts"]["lies"]["norm"].update(sequence="x"), "does not say how"),
        (lambda c: c["facts"]["lies"]["norm"].update(stride=0), "does not say how"),
        (lambda c: c["modules"].update(norm="a b"), "tensor name"),
        (lambda c: c["modules"].update(norm="layers.0"), "two modules have one name"),
        (lambda c: c.update(manual=["x"]), "tensor name"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(tmp_path, change, said):
    edited(tmp_path, change)
    with pytest.raises(ConfigError, match=said) as raised:
        traced.Capture.load(tmp_path)
    assert "compile the model again" in str(raised.value)


def test_a_file_of_nested_brackets_is_refused(tmp_path):
    (tmp_path / FILE).write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="cannot be read"):
        traced.Capture.load(tmp_path)


def test_nxdis_configuration_is_made_from_the_real_package_only():
    with pytest.raises(NotSupported, match=r"pip\.repos\.neuron\.amazonaws\.com"):
        CAPTURE.tensor_capture_config()
