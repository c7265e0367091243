"""`tensortap modes first-layer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tensortap.errors import RunExists
from tensortap.sinks import MemorySink
from tensortap_hf.command import printing
from tensortap_hf.command.capturing import Plan, capture, sentence
from tensortap_hf.command.options import (
    Alpha,
    AsJson,
    CalibData,
    CalibSamples,
    CalibSeqLen,
    Data,
    Device,
    Exclude,
    Inputs,
    Model,
    Modes,
    RandomInit,
    SeqLen,
)
from tensortap_hf.command.paths import require_folder
from tensortap_hf.command.preparing import Wanted, prepared
from tensortap_hf.command.runs import folders
from tensortap_hf.layouts import first_layer as layout
from tensortap_hf.modes import Mode


def first_layer(
    model: Model = None,
    random_init: RandomInit = None,
    wanted: Modes = "all",
    output_file: Annotated[
        Path, typer.Option(help="The .npz to write; its statistics go beside it.")
    ] = Path(layout.FILE),
    data: Data = None,
    seq_len: SeqLen = 512,
    calib_data: CalibData = None,
    calib_samples: CalibSamples = 10,
    calib_seq_len: CalibSeqLen = 512,
    percentile_alpha: Alpha = None,
    exclude: Exclude = None,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option(help="Replace the files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the first layer's input and output in several modes, of one sample, into one .npz.

    The output is the mixer's, before the residual addition; of a model without mixers, the
    layer's. Exit code: 0 all modes are in the file, 1 a mode failed and the others are, 2 nothing
    could be done.
    """
    output = output_file if output_file.suffix == ".npz" else Path(f"{output_file}.npz")
    taken = [path for path in (output, layout.stats_path(output)) if path.exists()]
    if taken and not overwrite:
        raise RunExists(f"{taken[0]} exists; choose another --output-file, or pass --overwrite.")
    require_folder(output.parent, "--output-file")
    plan, chosen = prepared(
        Wanted(model, random_init, device, wanted, "first", exclude or ()),
        Inputs(data, 1, seq_len, calib_data, calib_samples, calib_seq_len, percentile_alpha),
    )
    seen, failed = _capture(plan, chosen)
    about = layout.About(plan.loaded.source, pretrained_dir=model, seq_len=plan.samples.lengths[0])
    if seen:
        layout.write(output, seen, about)
    if as_json:
        files = [str(output), str(layout.stats_path(output))] if seen else []
        stats = layout.statistics(seen, about) if seen else {"modes": {}}
        printing.say_json({"files": files, "failed": failed, **stats})
    else:
        _print(seen, output)
    for name, why in failed.items():
        printing.complain(f"mode {name} failed: {why}")
    raise typer.Exit(2 if not seen else 1 if failed else 0)


def _capture(plan: Plan, chosen: Sequence[Mode]) -> tuple[list[layout.FirstLayer], dict[str, str]]:
    """Input and output of each mode, and why modes failed."""
    seen, failed = [], {}
    tensors = layout.choose(plan.layers.names)
    work = len(chosen) + plan.calibration.work(chosen)
    with printing.progress_of(work, "capturing") as progress:
        for name, mode in zip(folders(chosen), chosen, strict=True):
            sink = MemorySink()
            try:
                capture(plan, mode, sink, progress)
            except Exception as failure:  # Reported; the other modes matter as well.
                failed[name] = sentence(failure)
                continue
            values = [_only(sink, tensor) for tensor in tensors]
            said = (mode.family, mode.basis, mode.format)
            seen.append(layout.FirstLayer(name, *said, tensors, values[0], values[1]))
    return seen, failed


def _only(sink: MemorySink, name: str) -> torch.Tensor:
    payload = sink.find(name)[0][1]
    assert payload is not None
    return payload


def _print(seen: Sequence[layout.FirstLayer], output: Path) -> None:
    for one in seen:
        printing.say(f"mode {one.mode}")
        for word, stats in layout.described(one).items():
            printing.say(f"  {word.upper()}  {_line(stats)}")
            first = [printing.cell(value) for value in stats["first_10"]]
            printing.say(f"    first {len(first)}: {', '.join(first)}")
    if seen:
        printing.say(f"{output}: {printing.count(len(seen), 'mode')}, {', '.join(seen[0].tensors)}")


def _line(stats: dict[str, Any]) -> str:
    mean, std, low, high = (printing.cell(stats[key]) for key in ("mean", "std", "min", "max"))
    return f"shape {stats['shape']}, mean {mean}, std {std}, range [{low}, {high}]"
