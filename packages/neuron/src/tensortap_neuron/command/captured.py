"""Captured prompts below `--gpu-path`, `--neuron-path` and `--noise`, matched by their tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import NotSupported, RunError
from tensortap.records import TensorRecord
from tensortap.store import Run
from tensortap.store.layout import RUN as RUN_FILE
from tensortap_neuron.command.capturing import RUN
from tensortap_neuron.command.naming import place

_PROMPT = re.compile(r"prompt-(\d+)")
_FILES = ("layer_*_output.pt", "embedding_output.pt", "final_norm_output.pt", "metadata.pt")


@dataclass(frozen=True, slots=True)
class Captured:
    """One prompt's tensors: an open run, and the path it is called by."""

    name: str
    path: Path
    run: Run

    @property
    def prompt(self) -> str | None:
        """The text, where the run knows it."""
        found = self.run.info.metadata.get("prompt")
        return found if isinstance(found, str) else None

    @property
    def ids(self) -> tuple[int, ...] | None:
        """The token ids without padding, where the run knows them."""
        said = self.run.info.metadata
        ids = _flat(said.get("token_ids", said.get("input_ids")))
        mask = _flat(said.get("attention_mask"))
        if len(mask) == len(ids):
            ids = tuple(one for one, kept in zip(ids, mask, strict=True) if kept)
        return ids or None

    @property
    def dtype(self) -> str | None:
        """That of its layers, where all have one."""
        found = {one.dtype for one in self._layers()}
        return found.pop() if len(found) == 1 else None

    @property
    def remarks(self) -> list[str]:
        """What was remarked on all of an imported folder, and pads that nothing cuts."""
        notes = self.run.coverage().get("notes", ())
        said = [str(row["reason"]) for row in notes if row["name"] == "*"]
        cut = any(one.placement and one.placement.valid for one in self._layers())
        if not said and not cut and _has_pads(self.run.info.metadata.get("attention_mask")):
            said = ["its attention_mask leaves tokens out, and their padding is compared"]
        return [f"{self.path}: {one}" for one in said]

    def _layers(self) -> Iterator[TensorRecord]:
        return (one for one in self.run.records() if place(str(one.name)) is not None)


@dataclass(frozen=True, slots=True)
class Trio:
    """One prompt: the reference, the port, and the noise run if there is one."""

    ref: Captured
    port: Captured
    noise: Captured | None

    @property
    def remarks(self) -> list[str]:
        """What is to be known of the runs before their comparison is believed."""
        sides = [self.ref, self.port] + ([self.noise] if self.noise else [])
        said = [line for one in sides for line in one.remarks]
        noise = None if self.noise is None else self.noise.dtype
        if None not in (noise, self.port.dtype) and noise != self.port.dtype:
            said.append(
                f"--noise is {noise} and the port {self.port.dtype}: the noise is the reference "
                "once more in the port's dtype, and says little in another"
            )
        ref, port = _step(self.ref.dtype), _step(self.port.dtype)
        if ref is not None and port is not None and ref > port:
            said.append(
                f"the reference is {self.ref.dtype} and the port {self.port.dtype}: the finer one "
                "should be the reference, or rounding of the reference is held against the port"
            )
        return said

    @property
    def prompt(self) -> str | None:
        """The text, where any of them knows it."""
        known = (one.prompt for one in (self.ref, self.port, self.noise) if one is not None)
        return next((text for text in known if text is not None), None)


def _has_pads(mask: Any) -> bool:
    rows = mask if isinstance(mask, list) else []
    return not all(all(row) if isinstance(row, list) else row for row in rows)


def _step(dtype: str | None) -> float | None:
    """Between 1 and the next number; `None` of what is no kind of floats."""
    kind = getattr(torch, dtype or "", None)
    if isinstance(kind, torch.dtype) and kind.is_floating_point:
        return torch.finfo(kind).eps
    return None


def _flat(ids: Any) -> tuple[int, ...]:
    """Ids as a list, or as a batch of one, as tensors are written by older scripts."""
    if isinstance(ids, list) and len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
        return ()
    return tuple(ids)


def require_analysis() -> None:
    """Raise unless tensortap-analysis, which measures and judges, is installed."""
    try:
        import tensortap_analysis  # noqa: F401
    except ImportError as failure:
        raise NotSupported(
            'comparing needs tensortap-analysis: pip install "tensortap[analysis]".'
        ) from failure


@contextmanager
def opened(path: Path, option: str) -> Iterator[list[Captured]]:
    """Every prompt below `path`: a run, a layers-pt folder, or what `neuron layers --out` made.

    Files of older scripts are imported into a temporary directory. Raises `RunError` for a path
    that is none of these.
    """
    from tensortap_analysis.captured import sources

    with ExitStack() as stack:
        found = []
        for name, folder in _below(path, option):
            layout = None if _is_run(folder) else "layers-pt"
            run = stack.enter_context(sources.opened(folder, layout))
            found.append(Captured(name, folder, run))
        yield found


def _below(path: Path, option: str) -> Iterator[tuple[str, Path]]:
    one = _single(path)
    if one is not None:
        yield path.resolve().name, one
        return
    numbered = sorted(
        (int(match[1]), child)
        for child in (path.iterdir() if path.is_dir() else ())
        if (match := _PROMPT.fullmatch(child.name)) is not None
    )
    prompts = [(child.name, found) for _, child in numbered if (found := _single(child))]
    if not prompts:
        raise RunError(
            f"{option} {path}: neither a run, nor a folder of layer_<i>_output.pt, nor what "
            "`tensortap neuron layers --out` makes."
        )
    yield from prompts


def _single(path: Path) -> Path | None:
    """The run or the files of one prompt, here or in its folder."""
    for folder in (path, path / RUN):
        if _is_run(folder):
            return folder
    return path if any(True for glob in _FILES for _ in path.glob(glob)) else None


def _is_run(path: Path) -> bool:
    return (path / RUN_FILE).is_file()


def matched(
    refs: Sequence[Captured], ports: Sequence[Captured], noises: Sequence[Captured] | None
) -> tuple[list[Trio], list[str]]:
    """Each prompt of the port beside the reference's and the noise's; and what found no partner.

    Token ids decide where both sides know them, else folder names, or that there is one of each.
    Raises `RunError` where no prompt has a partner.
    """
    trios, alone, used = [], [], set()
    for port in ports:
        ref = _partner(port, refs, len(ports))
        if ref is None:
            alone.append(f"{port.path}: no run of --gpu-path was given the same tokens")
            continue
        used.add(ref.path)
        noise = None if noises is None else _partner(port, noises, len(ports))
        if noises is not None and noise is None:
            alone.append(f"{port.path}: no run of --noise was given the same tokens")
            continue
        trios.append(Trio(ref, port, noise))
    alone += [f"{ref.path}: the port has no such prompt" for ref in refs if ref.path not in used]
    if not trios:
        raise RunError(
            f"The runs were given other tokens, so there is nothing to compare: {alone[0]}. "
            "Capture both with the same --prompt and tokenizer."
        )
    return trios, alone


def _partner(port: Captured, others: Sequence[Captured], ports: int) -> Captured | None:
    same = [one for one in others if one.ids == port.ids is not None]
    named = [one for one in same if one.name == port.name]
    if named or same:
        return (named or same)[0]
    unknown = [one for one in others if one.ids is None or port.ids is None]
    if len(others) == ports == len(unknown) == 1:
        return unknown[0]
    return next((one for one in unknown if one.name == port.name), None)
