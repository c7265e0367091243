"""Names, selections, settings: what is parsed at the edge."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensortap import ConfigError, SelectionError, TensorName
from tensortap.config import Settings, ValueRules, parse_bytes
from tensortap.names import PHASES, escape
from tensortap.selection import Indices, Selection

words = st.text(min_size=1, max_size=20).map(escape)


@given(words, st.sampled_from(PHASES), words)
def test_every_name_survives_a_round_trip(module, phase, tensor):
    name = TensorName(module, phase, tensor)
    assert TensorName.parse(str(name)) == name


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers.0", "write module/phase/tensor"),
        ("a/b/c/d", "write module/phase/tensor"),
        ("a/sideways/c", "phases are forward, backward, param, grad"),
        ("/forward/x", "must not be empty"),
        ("a b/forward/x", "spaces"),
    ],
)
def test_a_name_that_is_none_says_why(text, says):
    with pytest.raises(ConfigError, match=says):
        TensorName.parse(text)


@pytest.mark.parametrize(
    ("patterns", "name", "selected"),
    [
        ("*", "a/forward/b", True),
        ("layers.*.attn.*/forward/*", "layers.3.attn.q/forward/input", True),
        ("layers.*.attn.*/forward/*", "layers.3.mlp.up/forward/input", False),
        ("layers.?/*", "layers.3/forward/output", True),
        ("layers.?/*", "layers.13/forward/output", False),
        ("layers.[0-2]/*", "layers.1/forward/output", True),
        ("layers.[!0-2]/*", "layers.1/forward/output", False),
        ("a/*,b/*", "b/grad/weight", True),
        ("*,!*/param/*", "b/param/weight", False),
        ("!*/param/*", "b/grad/weight", True),
        ("layers.0", "layers.0/forward/output", True),
        ("layers.0", "layers.0.q/forward/output", False),
        ("layers.0.*", "layers.0/forward/output", True),
        ("layers.0.*", "layers.0.q/forward/output", True),
        ("layers.0.*", "layers.01/forward/output", False),
        ("*,!lm_head", "lm_head/forward/output", False),
        ("*weight", "lm_head/param/weight", True),
        ("re:layers\\.(0|11)/.*", "layers.11/forward/output", True),
        ("re:layers\\.\\d{1,2}/.*,x/*", "layers.11/forward/output", True),
        ("re:layers", "layers.11/forward/output", False),
    ],
)
def test_selection(patterns, name, selected):
    assert Selection.parse(patterns).matches(name) is selected


globs = st.text(alphabet="ab*?./", max_size=8)
names = st.text(alphabet="ab./", max_size=8)


@given(globs, names, names)
def test_a_prefix_may_match_exactly_when_it_can_be_continued(glob, prefix, rest):
    if not glob:
        return
    selection = Selection.parse([glob])
    if "/" in glob and fnmatch.fnmatchcase(prefix + rest, glob):
        assert selection.matches(prefix + rest)
    if "/" not in rest and selection.matches(prefix + rest):
        assert selection.may_match(prefix)
    excluding = Selection.parse(["*", "!" + glob])
    if not excluding.may_match(prefix):
        assert not excluding.matches(prefix + rest)


def test_a_star_before_a_module_does_not_reach_into_the_tensors_of_another() -> None:
    selection = Selection.parse("layers.*.mlp.down")
    assert selection.matches("layers.3.mlp.down/forward/output")
    assert not selection.matches("layers.3.attn.out/forward/input.mlp.down")
    assert not selection.may_match("layers.3.attn.out/forward/input.")
    assert selection.matches_module("layers.3.mlp.down")
    assert not selection.matches_module("layers.3.mlp")


@pytest.mark.parametrize("patterns", ["", "  ", ",", "!", []])
def test_a_selection_of_nothing_is_an_error(patterns):
    with pytest.raises(SelectionError, match="selects nothing"):
        Selection.parse(patterns)


def test_near_misses_name_whole_names_or_modules():
    names = ["layers.0.attn.q/forward/output", "layers.0.attn.k/forward/output", "embed/param/x"]
    wrong = Selection.parse("layers.0.attn.q/forward/outputs").nothing_in(names, "this run")
    assert "'layers.0.attn.q/forward/output'" in str(wrong)
    assert "'embed/*'" in str(Selection.parse("embd.*").nothing_in(names, "this run"))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (None, [0, 10**9], []),
        ("5", [5], [4, 6]),
        (7, [7], [0]),
        ("0:100:10", [0, 10, 90], [1, 100]),
        (range(0, 10, 5), [0, 5], [1, 10]),
        ([1, 4], [1, 4], [0, 2]),
        ("0,3:5", [0, 3, 4], [1, 2, 5]),
        ("10:", [10, 99], [9]),
        (":3", [0, 2], [3]),
        ("::2", [0, 2], [1]),
    ],
)
def test_steps(text, inside, outside):
    steps = Indices.parse(text, "steps")
    assert all(index in steps for index in inside)
    assert not any(index in steps for index in outside)


@pytest.mark.parametrize("text", ["x", "1-3", "0:10:0", "-1", "1:2:3:4", "1.5"])
def test_steps_that_cannot_be_read_name_the_setting(text):
    with pytest.raises(ConfigError, match="TENSORTAP_STEPS"):
        Settings.resolve({}, {"TENSORTAP_STEPS": text})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MiB", 256 << 20),
        ("2GB", 2 * 10**9),
        (4096, 4096),
        ("1.5KiB", 1536),
        ("1kb", 1000),
        ("256M", 256 * 10**6),
    ],
)
def test_sizes(text, size):
    assert parse_bytes("max_pending", text) == size


def test_arguments_come_before_the_environment_and_that_before_defaults():
    environ = {"TENSORTAP_SELECT": "a/*", "TENSORTAP_STEPS": "0:3", "TENSORTAP_VALUES": "full"}
    settings = Settings.resolve({"select": "b/*", "values": None}, environ)
    assert settings.select.text == "b/*"
    assert 2 in settings.steps
    assert 3 not in settings.steps
    assert settings.values("x/forward/y") == "full"
    assert settings.phases == PHASES
    assert settings.explicit
    assert not Settings.resolve({}, {}).explicit


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TENSORTAP_ENABLED", "maybe"),
        ("TENSORTAP_VALUES", "everything"),
        ("TENSORTAP_PHASES", "forward,sideways"),
        ("TENSORTAP_MAX_PENDING", "lots"),
        ("TENSORTAP_ON_ERROR", "shrug"),
        ("TENSORTAP_RANKS", "zero"),
        ("TENSOR_SAVE_ENABLED", "perhaps"),
    ],
)
def test_an_environment_value_that_cannot_be_read_names_the_variable(variable, value):
    with pytest.raises(ConfigError, match=variable):
        Settings.resolve({}, {variable: value})


def test_the_older_variables_mean_full_payloads():
    old = Settings.resolve({}, {"TENSOR_SAVE_ENABLED": "true", "TENSOR_SAVE_DIR": "logs"})
    assert (old.enabled, old.directory, old.values("a/forward/b")) == (True, "logs", "full")
    assert not Settings.resolve({}, {"TENSOR_SAVE_ENABLED": "0"}).enabled
    newer = {"TENSOR_SAVE_ENABLED": "1", "TENSORTAP_VALUES": "stats", "TENSORTAP_DIR": "here"}
    assert Settings.resolve({}, newer).values("a/forward/b") == "stats"
    assert Settings.resolve({}, newer).directory == "here"


def test_the_first_matching_rule_decides_the_values():
    rules = ValueRules.parse({"layers.0.*": "full", "layers.*": "sample"})
    assert [rules(f"{m}/forward/x") for m in ("layers.0.q", "layers.1.q", "embed")] == [
        "full",
        "sample",
        "stats",
    ]
    same = ValueRules.parse("layers.0.*=full, layers.*=sample")
    assert same("layers.0.q/forward/x") == "full"


@pytest.mark.parametrize(
    ("patterns", "parent", "every"),
    [
        ("*", "layers.1.", True),
        ("*/forward/output", "layers.1.", True),
        ("layers.1.*", "layers.1.", True),
        ("layers.1.*", "layers.2.", False),
        ("layers.1.mlp.up", "layers.1.mlp.", False),
        ("*,!*/param/*", "layers.1.", True),
        ("*,!*/forward/input", "layers.1.", True),
        ("*,!*.up/*", "layers.1.mlp.", False),
        ("*,!layers.2.*", "layers.1.mlp.", True),
        ("*,!layers.1.mlp.up", "layers.1.mlp.", False),
        ("*,!layers.1.mlp.up", "layers.1.attn.", True),
        ("!re:.*up.*", "layers.1.attn.", False),
    ],
)
def test_a_selection_knows_whether_it_takes_every_module_inside_another(patterns, parent, every):
    assert Selection.parse(patterns).takes_every(parent, "/forward/output") is every


@given(st.text(alphabet="ab.*?/", min_size=1, max_size=8), st.sampled_from(["", "a.", "b.a."]))
def test_no_word_is_left_out_where_every_one_is_taken(glob, parent):
    try:
        selection = Selection.parse(["*", f"!{glob}"])
    except SelectionError:
        return
    if selection.takes_every(parent, "/b"):
        for word in ("a", "b", "ab", "ba", "aa", "bb", "aba", "bab"):
            assert selection.matches(f"{parent}{word}/b")
