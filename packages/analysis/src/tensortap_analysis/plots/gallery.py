"""`plot`: every kind of picture of a run, in a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tensortap.errors import RunError
from tensortap.layouts import new_folder
from tensortap.store import Run
from tensortap_analysis.captured.steps import require_step
from tensortap_analysis.plots import attention
from tensortap_analysis.plots.against import draw_compared, draw_errors, draw_rounded
from tensortap_analysis.plots.drawing import Drawing, Plotted, Progress
from tensortap_analysis.plots.files import picture
from tensortap_analysis.plots.selecting import At, at_moments, latest, selected
from tensortap_analysis.plots.singles import draw_layers, draw_singles
from tensortap_analysis.plots.style import look
from tensortap_analysis.plots.summaries import draw_summaries
from tensortap_analysis.plots.survey import nothing_finite, survey, worst
from tensortap_analysis.progress import unmatched

__all__ = ["Plotted", "plot"]


def plot(
    run: Run,
    out: Path,
    *,
    against: Run | None = None,
    select: str | Iterable[str] | None = None,
    step: int | None = None,
    count: int = 12,
    causal: bool = True,
    called: str | None = None,
    progress: Progress = lambda what: None,
) -> Plotted:
    """Draw the run into the new folder `out`: summaries of all tensors, then single tensors.

    Single are the `count` worst: those with NaN or Inf in the order in which they came about,
    then those whose farthest value is the most standard deviations from the mean, or with
    `against` of the largest relative L2 error.
    `select` names others instead, without a limit; parts of fused tensors too. `called` is what
    the text calls the run, by default its path. Raises `SelectionError`, `RunError` for a run
    without records, `RunExists`.
    """
    found = survey(run, step=step)
    if not len(found.name):
        require_step(run, str(run.path), step)
        raise RunError(f"{run.path} has no statistics to draw.")
    chosen = None if select is None else selected(run, found, select)
    new_folder(out)
    held = at_moments(run, latest(found))
    drawing = Drawing(run, called or str(run.path), found, held, out, progress)
    with look():
        draw_summaries(drawing)
        _draw_attention(drawing, chosen, causal=causal)
        errors = None if against is None else draw_errors(drawing, against)
        moments = _worst(drawing, count, errors) if chosen is None else chosen
        single = at_moments(run, moments)
        draw_singles(drawing, single)
        names = {name for name, _ in moments}
        draw_layers(drawing, None if chosen is None else names, names)
        if against is None:
            draw_rounded(drawing, at_moments(run, moments[:6]) if chosen is None else single)
        else:
            draw_compared(drawing, against, single)
    runs = (run,) if against is None else (run, against)
    drawing.done.problems += [problem for one in runs for problem in one.problems]
    drawing.done.problems += [] if select is None else unmatched(run, select)
    return drawing.done


def _worst(drawing: Drawing, count: int, errors: Mapping[str, float] | None) -> At:
    """The worst of which there are values; worse ones of which there are none are noted."""
    picked: At = []
    hopeless = nothing_finite(drawing.found.floating)
    if hopeless:
        more = f" and {len(hopeless) - 1:,} more" if len(hopeless) > 1 else ""
        drawing.done.left_out.append(f"{hopeless[0]}{more}: every value is NaN or Inf")
    bare = 0
    for name, step in worst(drawing.found.floating, errors):
        if len(picked) >= count:
            break
        if name in drawing.latest and drawing.latest[name].values != "stats":
            picked.append((name, step))
        elif bare < count:
            drawing.without_values(name)
            bare += 1
    return picked


def _draw_attention(drawing: Drawing, chosen: At | None, *, causal: bool) -> None:
    """attention_maps/: by default of the first, middle and last layer."""
    modules = attention.modules(iter(drawing.latest))
    if chosen is None:
        ends = {0, len(modules) // 2, len(modules) - 1}
        modules = [module for at, module in enumerate(modules) if at in ends]
    else:
        wanted = {name.partition("/")[0] for name, _ in chosen}
        modules = [module for module in modules if module in wanted]
    for module in modules:
        drawing.progress(module)
        with drawing.noted(module):
            found = attention.maps(drawing.run, module, drawing.latest, causal=causal)
            if found is None:
                drawing.done.left_out.append(f"{module}: attention needs values of query and key")
                continue
            path = picture(drawing.out / "attention_maps", module)
            drawing.done.files.append(
                attention.draw(found, path, f"{drawing.run.path.name}: {module}, attention")
            )
