"""`tensortap neuron layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import tensortap
from tensortap.errors import ConfigError
from tensortap_neuron.command import describing, models, printing
from tensortap_neuron.command.capturing import FILES, RUN, capture, require_new
from tensortap_neuron.command.describing import Described, described
from tensortap_neuron.command.prompts import Prompt, tokenized
from tensortap_neuron.command.running import How

_TEST_TYPES = ("full", "extract-all")


def layers(
    model: Annotated[str, typer.Option(help="A folder, or a name in the local cache of the hub.")],
    prompt: Annotated[list[str], typer.Option(help="A text; may be repeated, one run each.")],
    out: Annotated[Path, typer.Option(help="Each prompt becomes a folder prompt-N in here.")],
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, xla or neuron; default: cpu, with --compiled neuron."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="fp64, fp32, bf16, fp16; auto: as the checkpoint says.")
    ] = "auto",
    compiled: Annotated[
        Path | None,
        typer.Option(help="Run it through NxDI: compile it to, or load it from, this folder."),
    ] = None,
    skip_compile: Annotated[
        bool, typer.Option("--skip-compile", help="Load what is in --compiled; compile nothing.")
    ] = False,
    neuron_config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Of NxDI's NeuronConfig, with --compiled: tp_degree=32."
        ),
    ] = None,
    test_type: Annotated[
        str, typer.Option(hidden=True, help="The older guide's: full or extract-all.")
    ] = "full",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the same prompts of an older start.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run prompts through a Hugging Face decoder, and keep every layer's output.

    Captured are the embedding, each layer and the final norm, in one teacher-forced forward. Of
    each prompt DIR/prompt-N/run is a run, and DIR/prompt-N/layers-pt the same as the files of
    older scripts. Exit code: 0 all is there and healthy, 1 a layer is missing or has NaN,
    infinities or |mean| > 10, 2 nothing could be done.
    """
    how = How(model, device, dtype, compiled, skip_compile, neuron_config or [])
    how.check()
    _check(prompt, out, test_type)
    models.require_transformers()
    require_new(out, len(prompt), overwrite=overwrite)
    found = tokenized(prompt, model)
    runner, about = how.ready()
    results = []
    with printing.progress() as progress:
        for one in found:
            progress(f"capturing prompt {one.number}", one.number, len(found))
            folder, lost = capture(runner, one, out, about)
            with tensortap.open_run(folder / RUN) as run:
                results.append((one, described(folder, run, runner.places, lost)))
    if as_json:
        printing.say_json({"out": str(out), **about, "prompts": [_json(*row) for row in results]})
    else:
        _print(about, results)
    raise typer.Exit(0 if all(result.fine for _, result in results) else 1)


def _check(prompt: list[str], out: Path, test_type: str) -> None:
    """Raise `ConfigError` for what can be told to be wrong without a model."""
    if test_type not in _TEST_TYPES:
        raise ConfigError(f"--test-type {test_type}: write one of {', '.join(_TEST_TYPES)}.")
    if not all(text.strip() for text in prompt):
        raise ConfigError("--prompt is empty.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is not a folder.")


def _json(prompt: Prompt, found: Described) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "token_ids": list(prompt.ids),
        "tokens": prompt.tokens,
        "run": str(found.folder / RUN),
        "layers_pt": str(found.folder / FILES),
        "layers": [layer.to_json() for layer in found.layers],
        "lacks": list(found.lacks),
        "fine": found.fine,
    }


def _print(about: dict[str, Any], results: list[tuple[Prompt, Described]]) -> None:
    behind = f" ({about['hardware']} behind torch_xla)" if "hardware" in about else ""
    printing.say(f"{about['model']} on {about['device']}{behind} in {about['dtype']}")
    for prompt, found in results:
        printing.say()
        stands_in = (
            ", the bytes of the text: there is no tokenizer" if prompt.tokens == "bytes" else ""
        )
        count = "1 token" if len(prompt.ids) == 1 else f"{len(prompt.ids)} tokens"
        printing.say(f"{prompt.text!r} ({count}{stands_in}): {found.folder}")
        printing.say_table(describing.HEADINGS, [layer.row for layer in found.key_layers])
        for layer in found.layers:
            printing.say(layer.line, "red" if layer.wrong else None)
        for line in found.lacks:
            printing.say(f"{printing.mark(False)} {line}", "red")
