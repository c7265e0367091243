"""`tensortap …`: look at runs, check them, convert them.

Exit codes: 0 fine, 1 the answer is bad news (a gap, a broken plugin, a lost tail), 2 it could not
be done. A user's mistake is one line on stderr, never a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import Progress

import tensortap
from tensortap.doctor import examine
from tensortap.errors import PluginError, RunError, TensortapError
from tensortap.layouts import layout
from tensortap.plugins import COMMANDS, load_plugin
from tensortap.showing import print_summary, records_shown, selected_parts, summary, uncovered
from tensortap.store import Run, RunDirectorySink, open_run, recover
from tensortap.store.codec import encode_record
from tensortap.tables import by_reason, grouped, print_whole, record_table

app = typer.Typer(
    name="tensortap",
    help="See what happens to the numbers inside a model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console(soft_wrap=True)
_err = Console(stderr=True)


def _print_version(asked: bool) -> None:
    if asked:
        _out.print(f"tensortap {tensortap.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """See what happens to the numbers inside a model."""


RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Select = Annotated[str, typer.Option(help="Names: globs with commas, ! excludes, re: regex.")]
Out = Annotated[Path, typer.Option(help="The folder to make; refused when it exists.")]
LayoutName = Annotated[str, typer.Option("--layout", help="pt, or one a plugin brings.")]


@app.command()
def show(
    run: RunPath,
    select: Select = "*",
    step: Annotated[int | None, typer.Option(help="Only this step.")] = None,
    rank: Annotated[int | None, typer.Option(help="Only this rank.")] = None,
    nonfinite: Annotated[
        bool,
        typer.Option("--nonfinite", help="Only tensors with NaN or infinity, the first first."),
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="Rows to print; 0 prints all.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Print the tensors of a run with their statistics, in execution order.

    The name of a part (`layers.0.attn.q` of a fused `layers.0.attn.qkv`) shows the fused tensor.
    """
    with open_run(run) as opened:
        records, count = records_shown(opened, select, step, rank, nonfinite=nonfinite)
        shown = list(islice(records, limit or None))
        if not shown and not nonfinite:
            at = "" if step is None else f" at step {step}"
            of = "" if rank is None else f" of rank {rank}"
            raise RunError(f"{run} has no such record{at}{of}; its steps are {opened.steps}.")
        more = sum(1 for _ in records) if count is None else count - len(shown)
        parts = selected_parts(opened, select)
        _warn_of_dead(opened, select)
        if as_json:
            tensors = [encode_record(record) for record in shown]
            found = {"tensors": tensors, "not_shown": more, "parts": parts}
            _print_json(summary(opened) | found)
            return
        print_summary(opened, _out)
        if shown:
            print_whole(record_table(shown), _out)
        else:
            _out.print("No NaN and no infinity in what was selected.")
        for part, fused in islice(parts.items(), limit or None):
            _out.print(f"{part} is a part of {fused}", highlight=False, markup=False)
        if more:
            _out.print(f"… and {more:,} more: narrow --select or --step, or raise --limit.")


def _warn_of_dead(run: Run, select: str) -> None:
    """A pattern that matches nothing among others that do is most likely a typo."""
    for pattern in run.unmatched(select):
        line = f"warning: the pattern {pattern!r} matches nothing in {run.path}"
        _err.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


@app.command()
def coverage(run: RunPath, as_json: AsJson = False) -> None:
    """Print what was expected and is missing, with reasons; exit 1 when there is a gap."""
    with open_run(run) as opened:
        report = dict(opened.coverage()) or uncovered(opened)
        problems = list(opened.problems)
    if as_json:
        _print_json(report | {"problems": problems})
    else:
        _print_coverage(report, problems)
    raise typer.Exit(1 if problems or not report.get("complete", True) else 0)


def _print_coverage(report: dict[str, Any], problems: list[str]) -> None:
    captured = report.get("captured", {})
    _out.print(
        f"{report.get('records', 0):,} records of {len(captured):,} tensors "
        f"in {report.get('steps', 0):,} step(s)"
    )
    for title, colour in (("gaps", "red"), ("notes", "dim")):
        rows = report.get(title, [])
        what = title if len(rows) != 1 else title.removesuffix("s")
        _out.print(f"[{colour}]{len(rows)} {what}[/]")
        for line in grouped((row["name"], row["reason"], row["count"]) for row in rows):
            _out.print(f"  {line}", highlight=False, markup=False)
    for problem in problems:
        _out.print(f"  {problem}", style="yellow", highlight=False, markup=False)


@app.command(name="recover")
def recover_run(run: RunPath, as_json: AsJson = False) -> None:
    """Finish a run whose process died: close its files, rebuild its index, count what is lost.

    Exit 1 when something was lost.
    """
    report = recover(run)
    if as_json:
        _print_json(report.as_dict())
    else:
        _out.print(str(report), highlight=False, markup=False)
    raise typer.Exit(1 if report.lost else 0)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Print versions, the compiled kernel, plugins and settings; exit 1 when one is broken."""
    findings = examine()
    if as_json:
        _print_json([finding.as_dict() for finding in findings])
    else:
        for finding in findings:
            mark = "[green]ok[/]  " if finding.fine else "[red]bad[/] "
            _out.print(f"{mark} [bold]{finding.what}[/]  ", end="")
            _out.print(finding.found, highlight=False, markup=False)
    raise typer.Exit(0 if all(finding.fine for finding in findings) else 1)


@app.command(name="export")
def export_run(
    run: RunPath, out: Out, name: LayoutName = "pt", select: Select = "*", as_json: AsJson = False
) -> None:
    """Write a run in another file layout; exit 1 when some records could not be written."""
    with open_run(run) as opened, _progress("exporting") as progress:
        moved = layout(name).export(opened, out, select, progress)
        _warn_of_dead(opened, select)
    _print_moved(f"{moved.records:,} records in {moved.files:,} files: {out}", moved, as_json)


@app.command(name="import")
def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What another tool wrote.")],
    out: Annotated[Path, typer.Option(help="The run to make; refused when it exists.")],
    name: LayoutName = "pt",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run at OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read another tool's files into a new run; exit 1 when some could not be read."""
    with _progress("importing") as progress:
        sink = RunDirectorySink(out, overwrite=overwrite)
        moved = layout(name).load(folder, sink, progress)
    _print_moved(f"{moved.records:,} records from {moved.files:,} files: {out}", moved, as_json)


def _print_moved(line: str, moved: Any, as_json: bool) -> None:
    if as_json:
        counts = {"records": moved.records, "files": moved.files}
        _print_json(counts | {"skipped": list(moved.skipped)})
    else:
        _out.print(line, highlight=False, markup=False)
        for skipped in by_reason(moved.skipped):
            _out.print(f"skipped {skipped}", highlight=False, markup=False)
    raise typer.Exit(1 if moved.skipped else 0)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    with Progress(console=_err, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done: progress.update(task, completed=done, description=f"{what} {done:,}")


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")


def _add_plugin_commands(word: str) -> None:
    """Commands of other packages; a broken one stays listed and says what is wrong with it.

    Only what is called is loaded, by the first word of the command line: some import much.
    """
    own = typer.main.get_command(app)
    if isinstance(own, typer.core.TyperGroup) and word in own.commands:
        return
    plugins = entry_points(group=COMMANDS)
    called = [entry for entry in plugins if entry.name == word]
    for entry in called or plugins:
        try:
            command = load_plugin(entry)
        except PluginError as error:
            command = _broken(entry, error)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            # A command may bring its own class, for what typer's options cannot say.
            app.command(name=entry.name, cls=vars(command).get("command_class"))(command)


def _broken(entry: EntryPoint, error: PluginError) -> Callable[[], None]:
    def command() -> None:
        raise error

    command.__doc__ = f"Broken: {entry.value} fails to load."
    return command


def main() -> None:
    """Entry point of the console script."""
    try:
        _add_plugin_commands(sys.argv[1] if len(sys.argv) > 1 else "")
        app(prog_name="tensortap")
    except (TensortapError, OSError) as error:
        _err.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
