"""`tensortap neuron compare`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from tensortap.errors import ConfigError
from tensortap_neuron.command import printing, reporting
from tensortap_neuron.command.captured import matched, opened, require_analysis
from tensortap_neuron.command.comparing import PRESETS, all_compared


def compare(
    gpu_path: Annotated[
        Path, typer.Option(help="The reference: a run, files of layers-pt, or a folder of prompts.")
    ],
    neuron_path: Annotated[Path, typer.Option(help="The port, likewise.")],
    noise: Annotated[
        Path | None,
        typer.Option(help="The reference once more, in the port's dtype on a trusted device."),
    ] = None,
    layer_pattern: Annotated[
        str, typer.Option(help='Only these: "layer_*", "layer_3", "*_output", "layers.1?".')
    ] = "*",
    preset: Annotated[
        str | None,
        typer.Option(
            help="port or classic: the older guide's thresholds; noise: the three-way rule. "
            "Default: noise with --noise, else port."
        ),
    ] = None,
    report_path: Annotated[
        Path | None, typer.Option(help="Write PATH.json and PATH.html (one page a prompt).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare a port with its reference, layer by layer and prompt by prompt.

    port: max |d| < 0.01, mean |d| < 0.001, cosine > 0.99. noise: |port - reference| over
    |noise - reference| < 1.5, and the errors are spread alike (Bhattacharyya > 0.99). Exit code:
    0 the port agrees, 1 it differs, or has NaN or infinities, 2 nobody can say: a layer that could
    not be compared, a prompt without a partner, nothing in common, or nothing could be done.
    """
    require_analysis()
    chosen = preset or ("noise" if noise is not None else "port")
    if chosen not in PRESETS:
        raise ConfigError(f"--preset {chosen}: write one of {', '.join(PRESETS)}.")
    if PRESETS[chosen] == "noise" and noise is None:
        raise ConfigError("--preset noise judges by a noise run; give --noise PATH.")
    stem = None if report_path is None else reporting.stem_of(report_path)
    with ExitStack() as stack:
        refs = stack.enter_context(opened(gpu_path, "--gpu-path"))
        ports = stack.enter_context(opened(neuron_path, "--neuron-path"))
        noises = stack.enter_context(opened(noise, "--noise")) if noise is not None else None
        trios, alone = matched(refs, ports, noises)
        with printing.progress() as progress:
            results = all_compared(trios, layer_pattern, chosen, progress)
        written = [] if stem is None else reporting.write(stem, results, alone, chosen)
    if as_json:
        printing.say_json(reporting.document(results, alone, chosen, written[1:]))
    else:
        reporting.say(results, alone, chosen)
        for path in written:
            printing.say(f"report: {path}")
    raise typer.Exit(reporting.code(results, alone))
