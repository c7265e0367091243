"""`tensortap scan`: which weights of a checkpoint are sick."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tensortap import formats as known
from tensortap.errors import ConfigError
from tensortap.tables import print_whole
from tensortap_analysis.options import limits_of
from tensortap_analysis.progress import warn
from tensortap_analysis.weights.command.arguments import (
    byte_progress,
    check_fail_on,
    interruptible,
    say_written,
    takes_workers,
    unmatched,
)
from tensortap_analysis.weights.command.recommending import Advice, advice, check_advice
from tensortap_analysis.weights.command.tables import (
    counted,
    document,
    health_lines,
    layer_table,
    shown,
    skipped_lines,
)
from tensortap_analysis.weights.health import SEVERITIES, Health, check_preset, health
from tensortap_analysis.weights.journal import kept
from tensortap_analysis.weights.options import Options
from tensortap_analysis.weights.recommend.compressing import ERROR
from tensortap_analysis.weights.recommend.quantizing import SQNR_DB
from tensortap_analysis.weights.result import ScanResult
from tensortap_analysis.weights.scope import Scope
from tensortap_analysis.weights.weight import Weight


@takes_workers
def scan(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            help="A .safetensors or torch.save file, a Hugging Face, DCP or Megatron folder, or a "
            "hub name that is in the local cache.",
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option(help="all, or some of spectral,quantization,sparsity,norms.")
    ] = "all",
    select: Annotated[str, typer.Option(help="Layers: globs with commas, ! excludes.")] = "*",
    parallel: Annotated[
        int, typer.Option(min=0, metavar="[N]", help="Workers; without a number, one a core.")
    ] = 1,
    formats: Annotated[
        str, typer.Option(help="Formats to find the SQNR of, with commas between them.")
    ] = ",".join(known.names()),
    full_spectrum: Annotated[
        bool, typer.Option("--full-spectrum", help="Keep all singular values.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Save the scan; when interrupted, it goes on from here.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another model's scan at --output.")
    ] = False,
    saved: Annotated[
        Path | None, typer.Option("--from", help="A saved scan; no weights are needed.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a report that opens in a browser, with charts.")
    ] = None,
    health_only: Annotated[
        bool, typer.Option("--health", help="Print only what is wrong, all of it.")
    ] = False,
    preset: Annotated[str, typer.Option(help="What counts as wrong: default or classic.")] = (
        "default"
    ),
    recommend: Annotated[
        str | None,
        typer.Option(help="Print only advice: quant (formats by layer) or compress (low ranks)."),
    ] = None,
    sqnr: Annotated[float, typer.Option(help="SQNR in dB that --recommend quant keeps.")] = SQNR_DB,
    error: Annotated[
        float, typer.Option(help="Share of the norm that --recommend compress may lose.")
    ] = ERROR,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Replace a limit: sqnr_warning=25."),
    ] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Exit 1 on an issue of critical, warning or info.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Layers to print; 0 prints all.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure every weight of a checkpoint: spectrum, quantisation, zeros, norms; and judge them.

    It needs no model code and no data, and holds a few tensors at a time. Exit code: 0 scanned,
    1 an issue of the severity that --fail-on names, 2 it could not be done, 130 interrupted.
    """
    limits = limits_of(threshold, "sqnr_warning=25")
    check_preset(preset, limits)
    check_fail_on(fail_on)
    if recommend is not None:
        check_advice(recommend, methods, sqnr, error)
    if html is not None:
        from tensortap_analysis.weights.report.page import target

        target(html)
    if saved is not None:
        given = {
            "--methods": methods != "all",
            "--select": select != "*",
            "--formats": formats != ",".join(known.names()),
            "--full-spectrum": full_spectrum,
            "--output": output is not None,
            "--overwrite": overwrite,
            "--parallel": parallel != 1,
        }
        _check_saved(model or [], given)
        scope, result = None, ScanResult.load(saved)
    else:
        scope, options = _opened(model or []), Options(_words(formats), full_spectrum)
        warn(unmatched([scope], select))
        with interruptible(partial(_kept, output)), byte_progress("scanning") as progress:
            result = scope.scan(
                methods, select=select, parallel=parallel, options=options, output=output,
                overwrite=overwrite, progress=progress, told=_tell,
            )  # fmt: skip
    found = health(result, preset, limits)
    if html is not None:
        _write(html, result, found, [] if scope is None else scope.weights(select))
    if recommend is not None:
        _recommend(advice(result, recommend, preset, sqnr, error), as_json)
    elif as_json:
        _say(document(result, found))
    else:
        _print(result, found, limit, health_only)
    say_written(output, html)
    failed = any(found.at_least(one) for one in SEVERITIES if one == fail_on)
    raise typer.Exit(1 if failed else 0)


def _kept(output: Path | None) -> str:
    if output is None:
        return "nothing is kept; with --output FILE a scan goes on where it was."
    return kept(output)


def _tell(sentence: str) -> None:
    Console(stderr=True, soft_wrap=True).print(sentence, highlight=False, markup=False)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _check_saved(words: list[str], given: Mapping[str, bool]) -> None:
    """A saved scan is shown as it is; what would change it needs the weights."""
    if words:
        raise ConfigError("--from shows what was saved; give either it or a model, not both.")
    if names := [name for name, is_given in given.items() if is_given]:
        raise ConfigError(f"--from shows what was saved: {', '.join(names)} needs the model.")


def _opened(words: list[str]) -> Scope:
    if len(words) != 1:
        raise ConfigError("scan needs one model: tensortap scan PATH, or --from report.json.")
    return Scope(words[0])


def _write(html: Path, result: ScanResult, found: Health, weights: Sequence[Weight]) -> None:
    """The HTML report; histograms need the weights, which a saved scan has not."""
    # plotly takes a while to import, and tables do not need it.
    from tensortap_analysis.weights.report.page import write_scan_report
    from tensortap_analysis.weights.report.spread import histograms, worst_layers

    write_scan_report(html, result, found, histograms(weights, worst_layers(result)))


def _recommend(found: Advice, as_json: bool) -> None:
    if as_json:
        _say(found.document)
        return
    console = Console(soft_wrap=True, highlight=False)
    for line in found.lines or ("Nothing is recommended.",):
        console.print(line)


def _say(content: object) -> None:
    sys.stdout.write(json.dumps(content, indent=1) + "\n")


def _print(result: ScanResult, found: Health, limit: int, health_only: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    if not health_only:
        print_whole(layer_table(result, limit), console)
        if limit and len(result) > limit:
            console.print(f"… and {len(result) - limit:,} more layers: raise --limit.")
        for line in skipped_lines(result.skipped):
            console.print(line, style="dim")
        for note in result.notes:
            console.print(note, style="yellow", markup=False)
    console.print(
        f"{counted(len(result), 'matrix', 'matrices')}, "
        f"{counted(len(result.vectors), 'vector', 'vectors')}, "
        f"{result.parameters:,} values of [bold]{shown(result.source)}[/]"
    )
    for line in health_lines(found, 0 if health_only else 5):
        console.print(line)
