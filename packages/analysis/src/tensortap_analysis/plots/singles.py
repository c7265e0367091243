"""Pictures of single tensors: distributions/, heatmaps/ and layers/."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from tensortap_analysis.captured.moments import Captured
from tensortap_analysis.captured.words import axes_of, family_of, layer_of
from tensortap_analysis.plots import distributions, heatmaps, layers
from tensortap_analysis.plots.drawing import Drawing, title
from tensortap_analysis.plots.samples import Sample, Sheet, image_of, numbers, sample, sheet, wide


def draw_singles(drawing: Drawing, tensors: Mapping[str, Captured]) -> None:
    """distributions/ and heatmaps/ of all these tensors, as far as there are values."""
    for name, tensor in tensors.items():
        if tensor.values == "stats":
            drawing.without_values(name)
            continue
        drawing.progress(name)
        with drawing.noted(name):
            path = drawing.path("distributions", tensor)
            shown = sample(tensor, distributions.LIMIT)
            drawing.done.files.append(distributions.draw(shown, path, title(tensor)))
        if tensor.values == "full":
            with drawing.noted(name):
                image = sheet(tensor.open())
                path = drawing.path("heatmaps", tensor)
                words = _axes_of(tensor, image)
                drawing.done.files.append(heatmaps.draw(image, path, title(tensor), words))


def _axes_of(tensor: Captured, shown: Sheet) -> tuple[str, str]:
    """Words for the rows and the columns of a sheet."""
    words = axes_of(tensor.first().dims)
    rows = " x ".join(words[:-1]) or "one row"
    return f"{rows} ({shown.shape[0]:,})", f"{words[-1] if words else 'value'} ({shown.shape[1]:,})"


def draw_layers(drawing: Drawing, chosen: Collection[str] | None, drawn: Collection[str]) -> None:
    """layers/: outputs of layers, of those that are `chosen` or `drawn` as single tensors.

    Where nothing was chosen, also of the first, the middle and the last one.
    """
    outputs = [name for name in drawing.latest if family_of(name) == "layer/forward/output"]
    outputs.sort(key=lambda name: layer_of(name) or 0)
    if chosen is None:
        ends = {0, len(outputs) // 2, len(outputs) - 1}
        chosen = {name for at, name in enumerate(outputs) if at in ends}
    for name in outputs:
        if name not in chosen and name not in drawn:
            continue
        if drawing.latest[name].values != "full":
            drawing.without_values(name)
            continue
        drawing.progress(name)
        with drawing.noted(name):
            _draw_layer(drawing, drawing.latest[name])


def _draw_layer(drawing: Drawing, tensor: Captured) -> None:
    logical = tensor.open()
    shape = logical.shape
    if not shape or not math.prod(shape):
        drawing.done.left_out.append(f"{tensor.name}: layers/ needs rows of values, shape {shape}")
        return
    # The first features alone, so that none of them is pooled with others.
    few = min(layers.FEATURES, shape[-1])
    features = logical.read([*((0, size) for size in shape[:-1]), (0, few)])
    shown = sample(tensor, distributions.LIMIT)
    box = _leading(shape, layers.FIRST)
    leading = wide(numbers(logical.read(box)).reshape(-1)[: layers.FIRST])
    path = drawing.path("layers", tensor)
    first = Sample(leading, leading.size, 1)
    image = image_of(features)
    drawing.done.files.append(layers.draw(shown, first, image, path, title(tensor)))


def _leading(shape: Sequence[int], count: int) -> list[tuple[int, int]]:
    """A box at the beginning with at least `count` values, if there are as many."""
    box, inside = [(0, size) for size in shape], 1
    for axis in reversed(range(len(shape))):
        box[axis] = (0, min(shape[axis], -(-count // inside)))
        inside *= shape[axis]
    return box
