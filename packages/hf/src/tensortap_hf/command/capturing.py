"""One run for each mode, on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensortap
from tensortap.errors import RunExists, TensortapError
from tensortap.sinks import TensorSink
from tensortap.store.disk import whole_folder
from tensortap_hf import modes
from tensortap_hf.command.layers import Layers
from tensortap_hf.command.models import Loaded
from tensortap_hf.command.runs import folders
from tensortap_hf.command.samples import Samples
from tensortap_hf.modes import Mode

Progress = Callable[[str], None]
"""Called at each forward, of calibration as well, with what is done now."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mode."""

    mode: str
    family: str
    run: str
    records: int = 0
    seconds: float = 0.0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(slots=True)
class Calibration:
    """What modes are calibrated with; done once for each family, when first needed."""

    samples: Samples
    alpha: float | None
    _done: dict[str, Any] = field(default_factory=dict)

    def of(self, mode: Mode, model: nn.Module, progress: Progress) -> Any:
        """What `apply` takes for this mode; `None` for a mode that needs none."""
        if not mode.needs_calibration:
            return None
        calibrate = modes.family(mode.family).calibrate
        ids = _placed(self.samples, model)
        if calibrate is None:
            return ids
        if mode.family not in self._done:
            said = f"calibrating {mode.family}"
            options = {} if self.alpha is None else {"percentile_alpha": self.alpha}
            with torch.no_grad():
                self._done[mode.family] = calibrate(
                    model, ids, progress=lambda done: progress(f"{said}, sample {done}"), **options
                )
        return self._done[mode.family]

    def to_json(self) -> dict[str, Any]:
        """What a run keeps in its metadata."""
        return {**self.samples.to_json(), "percentile_alpha": self.alpha}

    def work(self, chosen: Sequence[Mode]) -> int:
        """How often `of` reports progress for these modes."""
        needy = {mode.family for mode in chosen if mode.needs_calibration}
        counted = [name for name in needy if modes.family(name).calibrate is not None]
        return len(counted) * len(self.samples.ids)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is captured of every mode."""

    loaded: Loaded
    layers: Layers
    samples: Samples
    calibration: Calibration
    weights: str
    """Their fingerprint."""
    exclude: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def excluded(self, mode: Mode) -> tuple[str, ...]:
        """What a mode leaves out; there is nothing to leave out of one of floats."""
        return self.exclude if mode.quantises else ()

    def about(self, mode: Mode) -> dict[str, Any]:
        """The metadata of the run of a mode."""
        return {
            "model": self.loaded.source,
            "weights": self.weights,
            "inputs": self.samples.to_json(),
            "layers": list(self.layers.numbers),
            "calibration": self.calibration.to_json() if mode.needs_calibration else None,
            "exclude": list(self.excluded(mode)),
            **self.metadata,
        }


def capture_all(
    plan: Plan, chosen: Sequence[Mode], out: Path, progress: Progress, *, overwrite: bool
) -> list[Outcome]:
    """Capture each mode below `out`; one that fails leaves no run, and the others go on.

    Raises `RunExists`, before anything is computed, where a run is there already.
    """
    paths = [out / name for name in folders(chosen)]
    taken = [path for path in paths if path.exists() and not overwrite]
    if taken:
        raise RunExists(f"{taken[0]} exists; choose another --out, or pass --overwrite.")
    return [_outcome(plan, mode, path, progress) for mode, path in zip(chosen, paths, strict=True)]


def _outcome(plan: Plan, mode: Mode, path: Path, progress: Progress) -> Outcome:
    begun = time.perf_counter()
    try:
        records = _whole_run(plan, mode, path, progress)
    except Exception as failure:  # Reported with the mode's name; the other modes matter as well.
        return Outcome(mode.name, mode.family, str(path), error=sentence(failure))
    seconds = time.perf_counter() - begun
    return Outcome(mode.name, mode.family, str(path), records, round(seconds, 3))


def _whole_run(plan: Plan, mode: Mode, path: Path, progress: Progress) -> int:
    """Capture beside `path`, and move there what is whole: an older run outlives a failure."""
    with whole_folder(path) as partial:
        return capture(plan, mode, partial, progress)


def capture(plan: Plan, mode: Mode, sink: Path | TensorSink, progress: Progress) -> int:
    """Run all samples in one mode, each a step of its own; returns the number of records."""
    model = plan.loaded.model
    calibration = plan.calibration.of(mode, model, progress)
    with modes.apply(model, mode, calibration=calibration, exclude=plan.excluded(mode)):
        tap = tensortap.attach(
            model, sink, **_CAPTURE, select=plan.layers.select, metadata=plan.about(mode)
        )
        with tap, torch.no_grad():
            for number, ids in enumerate(_placed(plan.samples, model), start=1):
                progress(f"{mode.title}, sample {number}")
                model(**_inputs(model, ids))
    return tap.coverage.total


_CAPTURE: Mapping[str, Any] = {
    # Whatever the environment says of taps is meant for others.
    "enabled": True, "steps": "0:", "phases": ("forward",), "values": "full",
    "on_error": "raise", "overwrite": True,
}  # fmt: skip


def _inputs(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a forward; a decoder beside an encoder gets the same tokens."""
    config = getattr(model, "config", None)
    both = bool(getattr(config, "is_encoder_decoder", False))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if both else {})}


def _placed(samples: Samples, model: nn.Module) -> list[torch.Tensor]:
    """The samples on the model's device."""
    device = next(model.parameters()).device
    return [sample.to(device) for sample in samples.ids]


def sentence(failure: Exception) -> str:
    """Why a mode failed, as one line."""
    if isinstance(failure, TensortapError):
        return str(failure)
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else 'no message'}"
