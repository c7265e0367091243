"""`plot`: every kind of picture of a run, in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tensortap.errors import NotSupported, RunError
from tensortap.layouts import new_folder
from tensortap.selection import Selection
from tensortap.store import Run
from tensortap_analysis.captured import Captured
from tensortap_analysis.plots import (
    attention,
    comparisons,
    distributions,
    gradients,
    heatmaps,
    layers,
    quick,
    statistics,
    text,
)
from tensortap_analysis.plots.files import picture
from tensortap_analysis.plots.pairs import Pair, pair
from tensortap_analysis.plots.samples import Sample, Sheet, image_of, ordinal, sample, sheet
from tensortap_analysis.plots.selecting import at_moments, latest
from tensortap_analysis.plots.style import look
from tensortap_analysis.plots.survey import Survey, survey, worst
from tensortap_analysis.plots.words import family_of, format_of, layer_of
from tensortap_analysis.whatif.judging import axes_of, contraction_axis

Progress = Callable[[str], None]
"""Called with what is drawn next."""
_ALL, _PAIRS = 1 << 12, 1 << 14
"""Values of each tensor in pictures of all tensors, and in the search for the largest error."""


@dataclass(slots=True)
class Plotted:
    """What was written; `left_out` says what could not be drawn for want of captured values,
    `failed` what could not be read.
    """

    files: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def plot(
    run: Run,
    out: Path,
    *,
    against: Run | None = None,
    select: str | Iterable[str] | None = None,
    step: int | None = None,
    count: int = 12,
    causal: bool = True,
    progress: Progress = lambda what: None,
) -> Plotted:
    """Draw the run into the new folder `out`: summaries of all tensors, then single tensors.

    Single are the `count` worst: those with NaN or Inf, else those whose farthest value is the
    most standard deviations from the mean, or with `against` of the largest relative L2 error.
    `select` names others instead, without a limit. Raises `SelectionError`, `RunError` for a run
    without records, `RunExists`.
    """
    found = survey(run, step=step)
    if not len(found.name):
        raise RunError(f"{run.path} has no statistics to draw at step {step}; it has {run.steps}.")
    chosen = None if select is None else _selected(run, found, select)
    new_folder(out)
    drawing = _Gallery(run, found, out, progress)
    with look():
        drawing.summary()
        drawing.attention(chosen, causal=causal)
        errors = None if against is None else drawing.errors(against)
        moments = drawing.worst(count, errors) if chosen is None else chosen
        drawing.single(at_moments(run, moments))
        drawing.layers(chosen, moments)
        if against is None:
            drawing.rounded(at_moments(run, moments[:6] if chosen is None else moments))
        else:
            drawing.compared(against, at_moments(run, moments))
    return drawing.done


def _selected(run: Run, found: Survey, select: str | Iterable[str]) -> list[tuple[str, int]]:
    selection = Selection.parse(select)
    moments = [(name, step) for name, step in latest(found) if selection.matches(name)]
    if not moments:
        raise selection.nothing_in(run.names(), str(run.path))
    return moments


class _Gallery:
    """Pictures of one run as they are drawn, and what could not be."""

    def __init__(self, run: Run, found: Survey, out: Path, progress: Progress) -> None:
        self.done = Plotted()
        self._run = run
        self._found = found
        self._floating = found.floating
        self._out = out
        self._progress = progress
        self._latest = at_moments(run, latest(found))

    def summary(self) -> None:
        """quick_analysis.png, tensor_stats.txt, statistics/ and gradients/."""
        self._progress("summary")
        formats = {name: format_of(tensor.records[0]) for name, tensor in self._latest.items()}
        values, tensors = text.shares(self._found, formats)
        page = self._out / "tensor_stats.txt"
        page.write_text(text.text(self._run, self._found, values, tensors), encoding="utf-8")
        model, count = self._run.info.model_class, len(self._found.names)
        title = f"{self._run.path.name}: {model}, {count:,} tensors"
        quick_path = self._out / "quick_analysis.png"
        self.done.files += [page, quick.draw(self._magnitudes(), values, quick_path, title)]
        self._progress("statistics")
        self.done.files += statistics.draw(self._floating, self._out / "statistics")
        self._progress("gradients")
        self.done.files += gradients.draw(self._floating, self._out / "gradients", self._samples)

    def _magnitudes(self) -> quick.Magnitudes:
        sizes = quick.Magnitudes()
        whole = {
            name for name, yes in zip(self._found.names, self._found.whole, strict=True) if yes
        }
        for name, tensor in self._latest.items():
            record = tensor.records[0]
            if name in whole:
                continue
            if tensor.whole or record.values == "sample":
                with self._noted(name):
                    sizes.add(sample(self._run, tensor, _ALL))
            elif record.stats is not None and record.stats.exponents is not None:
                stats = record.stats
                sizes.add_exponents(record.stats.exponents, stats.count, stats.zero)
        return sizes

    def _samples(self, names: Sequence[str]) -> Mapping[str, Sample]:
        found = {}
        for name in names:
            tensor = self._latest.get(name)
            if tensor is not None and self._has_values(tensor):
                with self._noted(name):
                    found[name] = sample(self._run, tensor, _ALL)
        return found

    def worst(self, count: int, errors: Mapping[str, float] | None) -> list[tuple[str, int]]:
        """The worst of which there are values; worse ones of which there are none are noted."""
        picked: list[tuple[str, int]] = []
        for name, step in worst(self._floating, errors):
            if len(picked) >= count:
                break
            if name in self._latest and self._has_values(self._latest[name]):
                picked.append((name, step))
            elif len(self.done.left_out) < count:
                self._without_values(name)
        return picked

    def errors(self, against: Run) -> dict[str, float]:
        """Relative L2 error of every tensor that both runs have values of, and its picture."""
        self._progress("errors against the reference")
        found: dict[str, float] = {}
        theirs = at_moments(against, [(n, t.at.step) for n, t in self._latest.items()])
        missing = [name for name in self._latest if name not in theirs]
        for name, tensor in self._latest.items():
            if name in theirs and tensor.whole and theirs[name].whole:
                with self._noted(name):
                    found[name] = self._pair(against, theirs[name], tensor, _PAIRS).relative_l2
        if missing:
            self.done.left_out.append(
                f"{missing[0]} and {len(missing) - 1:,} more: {against.path} has no such tensor at "
                "that step"
            )
        if not found:
            self.done.left_out.append("comparisons/: no tensor has values in both runs")
            return found
        path = self._out / "comparisons" / "overview.png"
        note = f"of up to {_PAIRS:,} values of each tensor, evenly spaced"
        title = f"{self._run.path.name} against {against.path.name}"
        self.done.files.append(comparisons.overview(found, path, title, note))
        return found

    def _pair(self, against: Run, ref: Captured, tensor: Captured, limit: int) -> Pair:
        return pair((against, ref), (self._run, tensor), limit)

    def single(self, tensors: Mapping[str, Captured]) -> None:
        """distributions/ and heatmaps/."""
        for name, tensor in tensors.items():
            if not self._has_values(tensor):
                self._without_values(name)
                continue
            self._progress(name)
            with self._noted(name):
                self._add(distributions.draw, "distributions", tensor,
                          sample(self._run, tensor, distributions.LIMIT))  # fmt: skip
            if tensor.whole:
                with self._noted(name):
                    shown = sheet(tensor.open(self._run))
                    path = self._path("heatmaps", tensor)
                    words = _axes_of(tensor, shown)
                    self.done.files.append(heatmaps.draw(shown, path, _title(tensor), words))

    def layers(
        self, chosen: Sequence[tuple[str, int]] | None, moments: Sequence[tuple[str, int]]
    ) -> None:
        """layers/: outputs of layers; by default the first, middle and last, and the worst."""
        outputs = [name for name in self._latest if family_of(name) == "layer/forward/output"]
        outputs.sort(key=lambda name: layer_of(name) or 0)
        if chosen is None:
            ends = {0, len(outputs) // 2, len(outputs) - 1}
            some = {name for at, name in enumerate(outputs) if at in ends}
        else:
            some = {name for name, _ in chosen}
        picked = [name for name in outputs if name in some or name in dict(moments)]
        for name in picked:
            tensor = self._latest[name]
            if not tensor.whole:
                self._without_values(name)
                continue
            self._progress(name)
            with self._noted(name):
                self._layer(tensor)

    def _layer(self, tensor: Captured) -> None:
        logical = tensor.open(self._run)
        shape = logical.shape
        # The first features alone, so that none of them is pooled with others.
        features = logical.read([*((0, size) for size in shape[:-1]), (0, min(100, shape[-1]))])
        shown = sample(self._run, tensor, distributions.LIMIT)
        leading = logical.read(_leading(shape, 1000)).reshape(-1)[:1000].double().numpy()
        path = self._path("layers", tensor)
        first = Sample(leading, leading.size, 1)
        image = image_of(features)
        self.done.files.append(layers.draw(shown, first, image, path, _title(tensor)))

    def rounded(self, tensors: Mapping[str, Captured]) -> None:
        """comparisons/ without another run: what number formats do to the same tensors."""
        for name, tensor in tensors.items():
            dtype = getattr(torch, tensor.records[0].dtype, torch.int64)
            if not tensor.whole or not dtype.is_floating_point:
                continue
            self._progress(name)
            with self._noted(name):
                logical = tensor.open(self._run)
                values, note = _rows(
                    logical.tensor(), contraction_axis(tensor.records[0], len(logical.shape))
                )
                path = self._path("comparisons", tensor, "formats")
                self.done.files.append(comparisons.of_formats(values, path, _title(tensor), note))

    def compared(self, against: Run, tensors: Mapping[str, Captured]) -> None:
        """comparisons/ with another run's tensors of the same name and step."""
        theirs = at_moments(against, [(n, t.at.step) for n, t in tensors.items()])
        for name, tensor in tensors.items():
            if name not in theirs or not (tensor.whole and theirs[name].whole):
                continue
            self._progress(name)
            with self._noted(name):
                both = self._pair(against, theirs[name], tensor, 1 << 20)
                path = self._path("comparisons", tensor)
                self.done.files.append(comparisons.of_runs(both, path, _title(tensor)))

    def attention(self, chosen: Sequence[tuple[str, int]] | None, *, causal: bool) -> None:
        """attention_maps/: by default of the first, middle and last layer."""
        modules = attention.modules(iter(self._latest))
        if chosen is None:
            ends = {0, len(modules) // 2, len(modules) - 1}
            modules = [module for at, module in enumerate(modules) if at in ends]
        else:
            wanted = {name.partition("/")[0] for name, _ in chosen}
            modules = [module for module in modules if module in wanted]
        for module in modules:
            self._progress(module)
            with self._noted(module):
                found = attention.maps(self._run, module, self._latest, causal=causal)
                if found is None:
                    self.done.left_out.append(f"{module}: attention needs values of query and key")
                    continue
                path = picture(self._out / "attention_maps", module)
                self.done.files.append(attention.draw(found, path, f"{module}: attention"))

    def _add(
        self, draw: Callable[[Sample, Path, str], Path], kind: str, tensor: Captured, shown: Sample
    ) -> None:
        self.done.files.append(draw(shown, self._path(kind, tensor), _title(tensor)))

    def _path(self, kind: str, tensor: Captured, more: str = "") -> Path:
        moment = tensor.moment.replace(" ", "_")
        return picture(self._out / kind, tensor.name, f"{moment}__{more}" if more else moment)

    def _has_values(self, tensor: Captured) -> bool:
        return tensor.whole or tensor.records[0].values == "sample"

    def _without_values(self, name: str) -> None:
        line = f"{name}: only its statistics were captured; capture it with values='full'"
        if line not in self.done.left_out:
            self.done.left_out.append(line)

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """A tensor that cannot be read is listed, and the rest is drawn."""
        try:
            yield
        except (RunError, NotSupported) as failure:
            line = str(failure)
            told = line if name in line else f"{name}: {line}"
            if told not in self.done.failed:
                self.done.failed.append(told)


def _title(tensor: Captured) -> str:
    record = tensor.records[0]
    shape = record.placement.logical_shape if record.placement else ()
    spelled = "x".join(map(str, shape or record.shape)) or "scalar"
    return f"{tensor.name}   {tensor.moment}, {spelled} {format_of(record)}"


def _axes_of(tensor: Captured, shown: Sheet) -> tuple[str, str]:
    """Words for the rows and the columns of a sheet."""
    words = axes_of(tensor.records[0])
    rows = " x ".join(words[:-1]) or "one row"
    return f"{rows} ({shown.shape[0]:,})", f"{words[-1] if words else 'value'} ({shown.shape[1]:,})"


def _leading(shape: Sequence[int], count: int) -> list[tuple[int, int]]:
    """A box at the beginning with at least `count` values, if there are as many."""
    box, inside = [(0, size) for size in shape], 1
    for axis in reversed(range(len(shape))):
        box[axis] = (0, min(shape[axis], -(-count // inside)))
        inside *= shape[axis]
    return box


def _rows(tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, str]:
    """[rows, contraction axis] in float32, at most about a million values, and what they are."""
    wide = tensor.reshape(1) if not tensor.ndim else tensor
    rows = wide.movedim(axis, -1).reshape(-1, wide.shape[axis])
    every = max(1, rows.numel() >> 18)
    note = f"every {ordinal(every)} row along the contraction axis" if every > 1 else "all values"
    return rows[::every].to(torch.float32), note
