"""Pictures of all tensors: quick_analysis.png, tensor_stats.txt, statistics/ and gradients/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tensortap_analysis.captured.words import format_of
from tensortap_analysis.plots import gradients, quick, statistics, text
from tensortap_analysis.plots.drawing import Drawing
from tensortap_analysis.plots.samples import Sample, sample

_ALL = 1 << 12
"""Values of each tensor in pictures of all tensors."""


def draw_summaries(drawing: Drawing) -> None:
    """All of them; tensors without values are there with what their statistics tell."""
    drawing.progress("summary")
    found, run = drawing.found, drawing.run
    formats = {name: format_of(tensor.first()) for name, tensor in drawing.latest.items()}
    values, tensors = text.shares(found, formats)
    page = drawing.out / "tensor_stats.txt"
    page.write_text(text.text(drawing.called, run, found, values, tensors), encoding="utf-8")
    title = f"{run.path.name}: {run.info.model_class}, {len(found.names):,} tensors"
    quick_path = drawing.out / "quick_analysis.png"
    drawing.done.files += [page, quick.draw(_magnitudes(drawing), values, quick_path, title)]
    drawing.progress("statistics")
    drawing.done.files += statistics.draw(found.floating, drawing.out / "statistics", run.path.name)
    drawing.progress("gradients")

    def samples(names: Sequence[str]) -> Mapping[str, Sample]:
        return _samples(drawing, names)

    drawing.done.files += gradients.draw(
        found.floating, drawing.out / "gradients", samples, run.path.name
    )


def _magnitudes(drawing: Drawing) -> quick.Magnitudes:
    sizes = quick.Magnitudes()
    for name in drawing.found.floating.present:
        tensor = drawing.latest[name]
        with drawing.noted(name):
            if tensor.values != "stats":
                sizes.add(sample(tensor, _ALL))
                continue
            known = [record.stats for record in tensor.pieces() if record.stats is not None]
            sizes.add_exponents([stats for stats in known if stats.exponents is not None])
    return sizes


def _samples(drawing: Drawing, names: Sequence[str]) -> Mapping[str, Sample]:
    found = {}
    for name in names:
        tensor = drawing.latest.get(name)
        if tensor is not None and tensor.values != "stats":
            with drawing.noted(name):
                found[name] = sample(tensor, _ALL)
    return found
