"""Which modes there are, and what a name means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.hf.modes.conftest import shifting
from torch import nn

from tensortap.errors import ConfigError
from tensortap_hf import modes

GENERIC = ("fp32", "fp16", "bf16", "int8", "hifp8", "mxfp8", "mxfp4", "nvfp4")


def test_every_transformers_model_has_the_generic_modes(family: str, build: Any) -> None:
    model = build(family)
    assert "generic" in modes.families_of(model)
    assert set(GENERIC) < set(modes.names("generic"))
    assert all(modes.get(name, "generic", model=model).name == name for name in GENERIC)


def test_a_model_of_no_framework_has_none() -> None:
    assert "generic" not in modes.families_of(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="Linear holds no transformers PreTrainedModel"):
        modes.get("mxfp4", model=nn.Linear(2, 2))


def test_an_unknown_name_gets_the_nearest_and_all_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'mxfp5' is not known; closest: 'mxfp\d'.*nvfp4"):
        modes.get("mxfp5")


def test_an_unknown_name_in_a_family_names_the_family() -> None:
    with pytest.raises(ConfigError, match="family generic has no mode 'mxfp5'"):
        modes.get("generic/mxfp5")


def test_a_name_in_two_families_must_be_spelled_out_without_a_model(
    new_family: Callable[..., Any],
) -> None:
    new_family("other", shifting("mxfp4", "other", 1))
    with pytest.raises(ConfigError, match=r"several families; write .*generic/mxfp4.*other/mxfp4"):
        modes.get("mxfp4")
    assert modes.get("other/mxfp4").family == "other"
    assert modes.get("mxfp4", "generic").family == "generic"


def test_the_model_decides_for_the_most_special_family(
    new_family: Callable[..., Any], build: Any
) -> None:
    def refuse(model: Any) -> str | None:
        return None if model.config.model_type == "llama" else "it is for Llama only"

    new_family("special", shifting("mxfp4", "special", 1), refuse=refuse)
    assert modes.get("mxfp4", model=build("llama")).family == "special"
    assert modes.get("mxfp4", model=build("gpt2")).family == "generic"
    with pytest.raises(ConfigError, match="mode special/mxfp4: it is for Llama only"):
        modes.get("special/mxfp4", model=build("gpt2"))


def test_modes_of_one_family_decide_for_names_in_several(
    new_family: Callable[..., Any], build: Any
) -> None:
    new_family("other", shifting("mxfp4", "other", 1), shifting("odd", "other", 2))
    model = build("llama")
    assert [m.title for m in modes.resolve(["mxfp4", "odd"], model=model)] == [
        "other/mxfp4", "other/odd",
    ]  # fmt: skip
    assert [m.title for m in modes.resolve(["mxfp4", "int8"], model=model)] == [
        "generic/mxfp4", "generic/int8",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="write generic/mxfp4 or other/mxfp4"):
        modes.resolve(["mxfp4", "odd", "int8"], model=model)


def test_a_mode_of_a_family_the_model_does_not_have_says_why(
    new_family: Callable[..., Any], build: Any
) -> None:
    new_family("other", shifting("odd", "other", 1), refuse=lambda model: "it is too small")
    with pytest.raises(ConfigError, match="mode other/odd: it is too small"):
        modes.get("odd", model=build("llama"))


@pytest.mark.parametrize("name", ["", "a/b", "a,b", "..", "a b"])
def test_a_name_that_could_not_be_typed_is_refused(new_family: Any, name: str) -> None:
    new_family("other")
    with pytest.raises(ConfigError, match="letters, digits"):
        modes.register(shifting(name, "other", 1))


def test_names_are_taken_once(new_family: Any) -> None:
    new_family("other", shifting("odd", "other", 1))
    with pytest.raises(ConfigError, match="a mode other/odd already"):
        modes.register(shifting("odd", "other", 2))
    with pytest.raises(ConfigError, match="called 'other' already"):
        new_family("other")
    with pytest.raises(ConfigError, match="no family 'nobody'"):
        modes.register(shifting("odd", "nobody", 2))
