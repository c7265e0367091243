"""`tensortap modes list` and `capture`: one run a mode, on the same inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf.modes.conftest import BERT, LLAMA, MAMBA, shifting
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

import tensortap
from tensortap_hf import modes
from tensortap_hf.command import models
from tensortap_hf.modes import Changes, Mode

Cli = Callable[..., tuple[int, str, str]]
Shape = Callable[[dict[str, Any]], Path]
SMALL = ("--samples", 2, "--seq-len", 7)


def test_list_names_every_mode_with_its_family_basis_and_equalities(cli: Cli) -> None:
    code, printed, _ = cli("modes", "list")
    assert code == 0
    for word in ("generic", "quamba", "mxfp4", "2-1", "rotated", "essential = "):
        assert word in printed
    listed = json.loads(cli("modes", "list", "--json")[1])
    by_title = {f"{one['family']}/{one['name']}": one for one in listed["modes"]}
    assert by_title["quamba/0"]["equals"] == ["2-0"]
    assert by_title["quamba/fp32"]["basis"] == "rotated"
    assert by_title["generic/fp32"]["basis"] == "native"
    presets = {one["name"]: one["presets"] for one in listed["families"]}
    assert presets["quamba"]["all"] == ["fp32", "0", "2-0", "2-1", "2-2", "2-3", "2-4", "3"]
    assert presets["quamba"]["essential"] == ["fp32", "0", "2-1", "2-2", "2-4"]
    assert presets["quamba"]["quant_only"] == presets["quamba"]["all"][1:]
    assert presets["quamba"]["fp_only"] == presets["generic"]["fp_only"] == ["fp32"]


def test_each_mode_is_a_run_of_what_the_model_computes_in_it(
    cli: Cli, shape: Shape, tmp_path: Path
) -> None:
    out, config = tmp_path / "runs", shape(LLAMA)
    code, printed, _ = cli(
        "modes", "capture", "--random-init", config, "--modes", "fp32,int8,bf16", *SMALL,
        "--out", out,
    )  # fmt: skip
    assert code == 0
    assert all(word in printed for word in ("fp32", "int8", "layers 0, 2", "2 samples of 7 tokens"))
    model = models.load(None, str(config), "cpu").model
    for mode in ("fp32", "int8", "bf16"):
        with tensortap.open_run(out / mode) as run:
            assert run.complete
            assert run.info.mode == mode
            assert run.names() == [
                f"layers.{n}/forward/{t}" for n in (0, 2) for t in ("input", "output")
            ]
            assert run.steps == [0, 1]
            for step, ids in enumerate(run.info.metadata["inputs"]["token_ids"]):
                with modes.apply(model, mode), torch.no_grad():
                    states = model.model(
                        input_ids=torch.tensor([ids]), output_hidden_states=True
                    ).hidden_states
                for layer in (0, 2):
                    given = run.tensor(f"layers.{layer}/forward/input", step=step)
                    assert torch.equal(given, states[layer])
                assert torch.equal(run.tensor("layers.0/forward/output", step=step), states[1])


def test_mixers_are_captured_beside_their_layers(cli: Cli, shape: Shape, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    code, _, _ = cli(
        "modes", "capture", "--random-init", shape(MAMBA), "--modes", "generic/fp32", *SMALL,
        "--layers", "all", "--out", out,
    )  # fmt: skip
    assert code == 0
    with tensortap.open_run(out / "fp32") as run:
        for layer in (0, 1):
            given, mixed, left = (
                run.tensor(f"layers.{layer}{name}", step=0)
                for name in ("/forward/input", ".mixer/forward/output", "/forward/output")
            )
            assert torch.allclose(left, given + mixed)
            assert not torch.equal(left, mixed)


def test_quamba_modes_are_what_a_mamba_gets_and_are_calibrated_once(
    cli: Cli, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from tensortap_hf.modes import registry

    calls = []
    quamba = modes.family("quamba")

    def calibrate(model: Any, samples: Any, **options: Any) -> Any:
        calls.append(([tuple(s.shape) for s in samples], options["percentile_alpha"]))
        assert quamba.calibrate is not None
        return quamba.calibrate(model, samples, **options)

    monkeypatch.setitem(registry._FAMILIES, "quamba", replace(quamba, calibrate=calibrate))
    out = tmp_path / "runs"
    code, printed, _ = cli(
        "modes", "capture", "--random-init", shape(MAMBA), "--modes", "essential", *SMALL,
        "--calib-samples", 3, "--calib-seq-len", 5, "--percentile-alpha", 0.999, "--out", out,
        "--json",
    )  # fmt: skip
    assert code == 0
    assert calls == [([(1, 5)] * 3, 0.999)]
    captured = json.loads(printed)["modes"]
    assert [(one["family"], one["mode"]) for one in captured] == [
        ("quamba", name) for name in ("fp32", "0", "2-1", "2-2", "2-4")
    ]
    with tensortap.open_run(out / "2-1") as run:
        assert run.info.metadata["mode"]["basis"] == "rotated"


def test_samples_of_different_lengths_stay_apart(cli: Cli, shape: Shape, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": t}) for t in ("abcdef", "xy", "hello world")))
    code, printed, warnings = cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "fp32", "--data", data,
        "--samples", 5, "--seq-len", 8, "--out", tmp_path / "runs", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(printed)["inputs"]["lengths"] == [6, 2, 8]
    assert "token ids are bytes of the text" in warnings
    assert "has 3 samples, not 5" in warnings
    with tensortap.open_run(tmp_path / "runs" / "fp32") as run:
        shapes = [run.tensor("layers.0/forward/input", step=s).shape for s in run.steps]
        assert shapes == [(1, 6, 32), (1, 2, 32), (1, 8, 32)]
        assert run.info.metadata["inputs"]["token_ids"][1] == [ord("x"), ord("y")]


def test_a_failing_mode_is_reported_and_the_others_are_kept(
    cli: Cli, shape: Shape, tmp_path: Path, new_family: Any
) -> None:
    def breaks(model: Any, undo: Any, options: Any) -> Changes:
        undo.replace(model.model.layers[1], "forward", lambda *a, **k: 1 / 0)
        return Changes()

    new_family("frail", Mode("breaks", "frail", "breaks", breaks))
    out = tmp_path / "runs"
    code, printed, errors = cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "fp32,breaks,int8", *SMALL,
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 1
    assert "mode frail/breaks failed: ZeroDivisionError: division by zero" in errors
    captured = {one["mode"]: one["error"] for one in json.loads(printed)["modes"]}
    assert captured == {"fp32": None, "breaks": "ZeroDivisionError: division by zero", "int8": None}
    assert sorted(path.name for path in out.iterdir()) == ["fp32", "int8"]
    with tensortap.open_run(out / "int8") as run:
        assert run.complete


def test_a_failure_leaves_the_older_run_of_the_mode(
    cli: Cli, shape: Shape, tmp_path: Path, new_family: Any
) -> None:
    fails = [False]

    def apply(model: Any, undo: Any, options: Any) -> Changes:
        if fails[0]:
            raise RuntimeError("no more")
        return Changes()

    new_family("frail", Mode("moody", "frail", "may fail", apply))
    arguments = (
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "moody", *SMALL,
        "--out", tmp_path / "runs", "--overwrite",
    )  # fmt: skip
    assert cli(*arguments)[0] == 0
    fails[0] = True
    assert cli(*arguments)[0] == 1
    with tensortap.open_run(tmp_path / "runs" / "moody") as run:
        assert run.complete


def test_an_existing_run_is_refused_before_anything_is_computed(
    cli: Cli, shape: Shape, tmp_path: Path
) -> None:
    arguments = (
        "modes", "capture", "--random-init", shape(LLAMA), *SMALL, "--out", tmp_path / "runs",
    )  # fmt: skip
    assert cli(*arguments, "--modes", "bf16")[0] == 0
    code, _, errors = cli(*arguments, "--modes", "fp32,bf16")
    assert code == 2
    assert "bf16 exists" in errors
    assert "--overwrite" in errors
    assert not (tmp_path / "runs" / "fp32").exists()
    assert cli(*arguments, "--modes", "fp32,bf16", "--overwrite")[0] == 0


def test_modes_that_are_equal_though_nobody_declared_it_are_named(
    cli: Cli, shape: Shape, tmp_path: Path, new_family: Any
) -> None:
    new_family(
        "shifts", shifting("none", "shifts", 0), shifting("nothing", "shifts", 0),
        shifting("one", "shifts", 1),
    )  # fmt: skip
    code, printed, warnings = cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "none,nothing,one", *SMALL,
        "--out", tmp_path / "runs", "--json",
    )  # fmt: skip
    assert code == 0
    assert "none and nothing are equal in every output too, which they do not declare" in warnings
    [found] = json.loads(printed)["equalities"]
    assert (found["one"], found["other"], found["kind"]) == ("none", "nothing", "undeclared")


def test_a_declared_equality_that_fails_is_an_error(
    cli: Cli, shape: Shape, tmp_path: Path, new_family: Any
) -> None:
    new_family(
        "shifts", shifting("one", "shifts", 1, equals=("two",)), shifting("two", "shifts", 2),
        shifting("uno", "shifts", 1, equals=("one",)),
    )  # fmt: skip
    code, printed, errors = cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "one,two,uno", *SMALL,
        "--out", tmp_path / "runs", "--json",
    )  # fmt: skip
    assert code == 1
    assert "one and two are declared to be bitwise equal, and differ from layers.0" in errors
    kinds = {(e["one"], e["other"]): e["kind"] for e in json.loads(printed)["equalities"]}
    assert kinds == {("one", "two"): "violated", ("one", "uno"): "declared"}


def test_declared_and_undeclared_equalities_are_told_apart() -> None:
    from tensortap_hf.command.equality import Equality, declared, undeclared

    pairs = [
        Equality("0", "2-0", "declared", 4),
        Equality("0", "2-1", "undeclared", 4),
        Equality("2-0", "2-1", "undeclared", 4),
        Equality("2-1", "2-2", "declared", 4),
        Equality("2-4", "3", "violated", 4, "layers.0/forward/output (sample 0)"),
    ]
    assert declared(pairs) == "Bitwise equal, as declared: 0 = 2-0; 2-1 = 2-2."
    [sentence] = undeclared(pairs)
    assert sentence.startswith("0 = 2-0 and 2-1 = 2-2 are equal in every output too")
    assert declared(pairs[4:]) is None
    assert undeclared([pairs[0], *pairs[3:]]) == []


def test_a_family_without_calibration_of_its_own_gets_the_samples(
    cli: Cli, shape: Shape, tmp_path: Path, new_family: Any
) -> None:
    seen = []

    def apply(model: Any, undo: Any, options: Any) -> Changes:
        seen.append([tuple(sample.shape) for sample in options.calibration])
        return Changes()

    new_family("needy", Mode("looks", "needy", "looks", apply, needs_calibration=True))
    code, _, _ = cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "looks", *SMALL,
        "--calib-samples", 3, "--calib-seq-len", 4, "--out", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0
    assert seen == [[(1, 4)] * 3]


def test_calibration_and_captured_inputs_are_separate(
    cli: Cli, shape: Shape, tmp_path: Path, new_family: Any
) -> None:
    seen = []

    def apply(model: Any, undo: Any, options: Any) -> Changes:
        seen.extend(sample[0].tolist() for sample in options.calibration)
        return Changes()

    new_family("needy", Mode("looks", "needy", "looks", apply, needs_calibration=True))
    (tmp_path / "one.txt").write_text("abcdef")
    (tmp_path / "two.txt").write_text("uvwxyz")
    arguments = (
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "looks", "--samples", 1,
        "--seq-len", 3, "--calib-samples", 1, "--calib-seq-len", 2, "--data", tmp_path / "one.txt",
    )  # fmt: skip
    assert cli(*arguments, "--calib-data", tmp_path / "two.txt", "--out", tmp_path / "a")[0] == 0
    assert cli(*arguments, "--out", tmp_path / "b")[0] == 0
    assert seen == [[ord("u"), ord("v")], [ord("a"), ord("b")]]
    with tensortap.open_run(tmp_path / "a" / "looks") as run:
        assert run.info.metadata["inputs"]["token_ids"] == [[ord(c) for c in "abc"]]


def test_modes_of_one_name_in_two_families_have_folders_of_their_own(
    cli: Cli, shape: Shape, tmp_path: Path
) -> None:
    code, _, _ = cli(
        "modes", "capture", "--random-init", shape(MAMBA), "--modes", "quamba/fp32,generic/fp32",
        *SMALL, "--out", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["generic-fp32", "quamba-fp32"]


def test_excluded_modules_are_left_alone(cli: Cli, shape: Shape, tmp_path: Path) -> None:
    cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "mxfp4", *SMALL,
        "--exclude", "layers.0.*", "--exclude", "layers.1.attn.*", "--out", tmp_path / "runs",
    )  # fmt: skip
    with tensortap.open_run(tmp_path / "runs" / "mxfp4") as run:
        said = run.info.metadata["mode"]
        assert said["kept"]["layers.0.mlp.up"] == said["kept"]["layers.1.attn.q"] == "excluded"
        assert "layers.1.mlp.up" in said["changed"]


@pytest.mark.parametrize("shape_name", ["gpt2", "bert", "t5", "mamba2", "mixtral"])
def test_a_folder_of_any_family_runs(shape_name: str, build: Any, cli: Cli, tmp_path: Path) -> None:
    build(shape_name).save_pretrained(tmp_path / "model")
    code, printed, warnings = cli(
        "modes", "capture", tmp_path / "model", "--modes", "fp32,mxfp8", *SMALL,
        "--out", tmp_path / "runs", "--json",
    )  # fmt: skip
    assert code == 0
    assert all(one["records"] > 0 for one in json.loads(printed)["modes"])
    assert "random token ids, unlike any text" in warnings


def test_the_tokenizer_of_the_model_is_used(build: Any, cli: Cli, tmp_path: Path) -> None:
    words = {"?": 0, "the": 5, "cat": 6, "sat": 7}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    build("gpt2").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat the dog")
    code, _, _ = cli(
        "modes", "capture", tmp_path / "model", "--modes", "fp32", "--data", tmp_path / "text.txt",
        "--samples", 1, "--seq-len", 5, "--out", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0
    with tensortap.open_run(tmp_path / "runs" / "fp32") as run:
        assert run.info.metadata["inputs"]["token_ids"] == [[5, 6, 7, 5, 0]]


def test_taps_in_the_environment_do_not_change_what_is_captured(
    cli: Cli, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORTAP_ENABLED", "0")
    monkeypatch.setenv("TENSORTAP_STEPS", "0")
    code, _, _ = cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "fp32", *SMALL,
        "--out", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0
    with tensortap.open_run(tmp_path / "runs" / "fp32") as run:
        assert run.steps == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "one of MODEL"),
        (("gpt2", "--random-init", "mamba-130m"), "one of MODEL"),
        (("--random-init", "nowhere"), "neither a file, a folder with a config.json, nor one of"),
        (("--random-init", "SHAPE", "--modes", "mxfp5"), "mode 'mxfp5' is not known"),
        (("--random-init", "SHAPE", "--modes", "2-1"), "mode quamba/2-1"),
        (("--random-init", "SHAPE", "--modes", ","), "--modes is empty"),
        (("--random-init", "SHAPE", "--layers", "0,9"), "'9' is none; write first, last, all"),
        (("--random-init", "SHAPE", "--layers", ","), "--layers is empty"),
        (("--random-init", "SHAPE", "--data", "none.txt"), "--data: there is no file none.txt"),
        (("--random-init", "SHAPE", "--percentile-alpha", "0"), "0 is not in (0, 1]"),
        (("--random-init", "SHAPE", "--device", "nowhere"), "--device nowhere"),
        (("/nowhere/at/all",), "cannot be loaded"),
        # Told before anything is loaded: the model is not missed.
        (("/nowhere/at/all", "--modes", "fp32,mxfp5"), "mode 'mxfp5' is not known"),
        (("/nowhere/at/all", "--modes", "nobody/fp32"), "no family of modes 'nobody'"),
        (("/nowhere/at/all", "--layers", "frist"), "'frist' is none; write first, last, all"),
    ],
)
def test_a_mistake_is_one_line_and_exits_2(
    cli: Cli, shape: Shape, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    given = [str(shape(LLAMA)) if word == "SHAPE" else word for word in arguments]
    code, _, errors = cli("modes", "capture", *given, "--out", tmp_path / "runs", "--samples", 1)
    assert code == 2
    [line] = [line for line in errors.splitlines() if line.startswith("error:")]
    assert says in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [("[]", "not a JSON object"), ("{", "is no JSON"), ('{"model_type": "nope"}', "nope")],
)
def test_a_config_that_is_none_says_so(cli: Cli, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    code, _, errors = cli("modes", "capture", "--random-init", tmp_path, "--out", tmp_path / "o")
    assert code == 2
    assert says in errors


def test_mamba_130m_is_built_in() -> None:
    fields = models.BUILT_IN["mamba-130m"]
    assert fields["model_type"] == "mamba"
    assert (fields["num_hidden_layers"], fields["hidden_size"]) == (24, 768)
    assert (fields["state_size"], fields["vocab_size"]) == (16, 50280)


@pytest.mark.parametrize("fields", [MAMBA, BERT], ids=["mamba", "bert"])
def test_bytes_stand_in_where_a_model_was_saved_without_its_tokenizer(
    cli: Cli, shape: Shape, tmp_path: Path, fields: dict[str, Any]
) -> None:
    """transformers makes a tokenizer of special tokens from the model's type, which loses text."""
    models.load(None, str(shape(fields)), "cpu").model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("hello world")
    code, _, errors = cli(
        "modes", "capture", tmp_path / "model", "--modes", "generic/fp32", "--data",
        tmp_path / "a.txt", "--seq-len", 11, "--out", tmp_path / "runs",
    )  # fmt: skip
    assert (code, "token ids are bytes" in errors) == (0, True)
    with tensortap.open_run(tmp_path / "runs" / "fp32") as run:
        [ids] = run.info.metadata["inputs"]["token_ids"]
    assert ids == [byte % fields["vocab_size"] for byte in b"hello world"]


def test_a_configuration_that_transformers_wrote_itself_is_read(
    cli: Cli, build: Any, tmp_path: Path
) -> None:
    """A Mamba2's has an infinity in it, which JSON has not."""
    build("mamba2").config.save_pretrained(tmp_path / "model")
    assert "__float__" in (tmp_path / "model" / "config.json").read_text()
    code, _, said = cli(
        "modes", "capture", "--random-init", tmp_path / "model", "--modes", "fp32", *SMALL,
        "--out", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0
    assert "not quamba: Mamba2ForCausalLM: the modes of Quamba are for MambaForCausalLM" in said


def test_what_is_excluded_is_excluded_of_what_quantises(
    cli: Cli, shape: Shape, tmp_path: Path
) -> None:
    code, _, _ = cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "fp32,mxfp4", *SMALL,
        "--exclude", "layers.0.*", "--out", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0
    with tensortap.open_run(tmp_path / "runs" / "mxfp4") as run:
        assert run.info.metadata["exclude"] == ["layers.0.*"]
        changed = run.info.metadata["mode"]["changed"]
        assert changed
        assert not any(name.startswith("layers.0.") for name in changed)
    with tensortap.open_run(tmp_path / "runs" / "fp32") as run:
        assert run.info.metadata["exclude"] == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [({**MAMBA, "hidden_size": "x"}, "hidden_size"), ({"model_type": "mambo"}, "mambo")],
)
def test_a_configuration_that_transformers_refuses_is_one_short_line(
    cli: Cli, shape: Shape, tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    code, _, errors = cli(
        "modes", "capture", "--random-init", shape(fields), "--out", tmp_path / "runs"
    )
    [line] = [line for line in errors.splitlines() if line.startswith("error:")]
    assert (code, says in line, len(line) < 400) == (2, True, True)
    assert not line.endswith(":"), "the reason is in the next line of the message"


def test_a_file_in_the_place_of_the_folder_is_told_before_the_model_is_loaded(
    cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "runs").write_text("")
    code, _, errors = cli("modes", "capture", "/nowhere", "--out", tmp_path / "runs")
    assert (code, "runs is not a folder" in errors) == (2, True)


def test_a_mamba_that_quamba_cannot_serve_is_told_why_its_modes_are_generic(
    cli: Cli, shape: Shape, tmp_path: Path
) -> None:
    # There is a Hadamard matrix of size 32, and none of size 36 that Quamba has.
    config = shape({**MAMBA, "hidden_size": 36})
    arguments = ("modes", "capture", "--random-init", config, *SMALL, "--out")
    code, _, said = cli(*arguments, tmp_path / "a", "--modes", "fp32")
    [line] = [line for line in said.splitlines() if line.startswith("warning:")]
    assert code == 0
    assert "the modes are those of generic, not quamba: The weights cannot be rotated" in line
    code, _, said = cli(*arguments, tmp_path / "b", "--modes", "generic/fp32")
    assert (code, said.count("quamba")) == (0, 0)
    code, _, said = cli(
        "modes", "first-layer", "--random-init", config, "--modes", "fp32",
        "--output-file", tmp_path / "c.npz",
    )  # fmt: skip
    assert (code, said.count("not quamba")) == (0, 1)


def test_models_that_quamba_is_not_meant_for_are_not_told_about_it(
    cli: Cli, shape: Shape, tmp_path: Path
) -> None:
    code, _, said = cli(
        "modes", "capture", "--random-init", shape(LLAMA), "--modes", "fp32", *SMALL,
        "--out", tmp_path / "runs",
    )  # fmt: skip
    assert (code, "warning" in said) == (0, False)
