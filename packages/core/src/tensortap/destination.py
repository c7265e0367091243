"""Where records go: the sink that was given, or a run directory, agreed on by all ranks."""

from __future__ import annotations

import os
import sys
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from tensortap.config import Settings
from tensortap.errors import ConfigError
from tensortap.records import RunInfo, TensorRecord
from tensortap.sinks import TensorSink
from tensortap.store import RunDirectorySink

_METHODS = ("open", "write", "end_step", "close")


def destination(given: Any, settings: Settings, info: RunInfo) -> tuple[TensorSink, Path | None]:
    """The sink for `attach`'s second argument, and its directory if that is a run directory.

    A rank that is not selected has a sink that keeps nothing: on lazy devices it is tapped as
    well. Raises `ConfigError` for what is neither a path nor a sink.
    """
    if info.rank not in settings.ranks:
        return _Nowhere(), None
    if given is not None and not isinstance(given, (str, os.PathLike)):
        missing = [method for method in _METHODS if not hasattr(given, method)]
        if missing:
            raise ConfigError(
                f"attach(model, {given!r}): the second argument is a run directory or an object "
                f"with the methods of tensortap.TensorSink; this one has no {missing[0]}()."
            )
        return given, None
    if given is None:
        path = _default_run(Path(settings.directory), info)
        if info.rank == 0:
            print(f"tensortap: recording to {path}", file=sys.stderr)
    else:
        path = Path(given)
    sink = RunDirectorySink(
        path,
        overwrite=settings.overwrite,
        durable=settings.durable,
        max_bytes=settings.max_bytes,
    )
    return sink, path


class _Nowhere:
    """A sink that nothing reaches."""

    def open(self, run: RunInfo) -> None:
        """No run is made."""

    def write(self, record: TensorRecord, payload: torch.Tensor | None) -> None:
        raise AssertionError(f"{record.name} of a rank that is not selected")

    def end_step(self, step: int) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """Nothing was opened."""


def _default_run(directory: Path, info: RunInfo) -> Path:
    """`<directory>/<UTC time>-<model class>`, agreed on by all ranks of a launch.

    The first rank to arrive writes its proposal into a file of the launch; the others read it.
    """
    moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")[:-3] + "Z"
    proposal = f"{moment}-{info.model_class}"
    if info.world_size == 1:
        return directory / proposal
    directory.mkdir(parents=True, exist_ok=True)
    agreement = directory / f".launch-{info.launch_id}"
    draft = directory / f".launch-{info.launch_id}.{uuid.uuid4().hex}"
    draft.write_text(proposal)
    try:
        os.link(draft, agreement)
    except FileExistsError:
        proposal = agreement.read_text()
    finally:
        draft.unlink()
    return directory / Path(proposal).name
