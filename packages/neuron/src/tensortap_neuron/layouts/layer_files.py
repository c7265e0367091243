"""Writing the layout `layers-pt`: one forward of a run, and what is known of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tensortap.errors import RunError
from tensortap.layouts import Moved, Progress, new_folder
from tensortap.records import RunInfo, TensorRecord
from tensortap.store import Run
from tensortap.store.documents import plain
from tensortap_neuron.layouts.layer_metadata import METADATA, OURS

BARE = "statistics only; capture with values='full'"
SAMPLED = "only some of its elements were captured; capture with values='full'"
_NAME = re.compile(r"(?:layers\.(?P<layer>\d{1,6})|embed|final_norm)/forward/output")
_WORDS = {"embed/forward/output": "embedding", "final_norm/forward/output": "final_norm"}

Moment = tuple[int, int, int, bool]
"""Step, microbatch, call, and whether it was an evaluation."""


def export(run: Run, out: Path, select: str, progress: Progress) -> Moved:
    """Write the first forward of which a layer, the embedding or the final norm was captured."""
    moments: dict[Moment, dict[str, TensorRecord]] = {}
    for record in run.records(select):
        what = word_of(record)
        if what is not None and not record.at.recompute:
            moments.setdefault(_moment(record), {}).setdefault(what, record)
    usable = [
        when for when, some in moments.items() if any(r.values == "full" for r in some.values())
    ]
    if not usable:
        why = f": {BARE}" if moments else ""
        raise RunError(f"{run.path} has no values of a layer, embedding or final norm{why}.")
    chosen = min(usable)
    new_folder(out)
    skipped = [f"{run.path}: exported as far as it goes, but {p}" for p in run.problems]
    written: dict[str, torch.Tensor] = {}
    for what, record in sorted(moments[chosen].items(), key=lambda item: _order(item[0])):
        values = _values(run, record, skipped)
        if values is not None:
            torch.save(values, out / f"{what}_output.pt")
            written[what] = values
            progress(len(written))
    if not written:
        raise RunError(f"{run.path}: nothing could be read. {skipped[-1]}.")
    torch.save(_metadata(run, chosen, moments[chosen], written), out / METADATA)
    skipped += _others(moments, chosen)
    return Moved(len(written), len(written) + 1, tuple(skipped))


def word_of(record: TensorRecord) -> str | None:
    """`layer_3`, `embedding`, `final_norm`, or `None` for a tensor that the layout has no file of.

    The name decides: of GPT-2 and Mamba as of Llama these are `layers.3`, `embed`, `final_norm`.
    """
    found = _NAME.fullmatch(str(record.name))
    if found is None:
        return None
    return _WORDS.get(str(record.name)) or f"layer_{found['layer']}"


def _order(what: str) -> tuple[int, int]:
    number = what.partition("_")[2]
    return (1, int(number)) if number.isdecimal() else (0 if what == "embedding" else 2, 0)


def _moment(record: TensorRecord) -> Moment:
    at = record.at
    return at.step, at.microbatch, at.call, at.eval


def _values(run: Run, record: TensorRecord, skipped: list[str]) -> torch.Tensor | None:
    """All of it, with its padding; a copy, or torch.save would write the whole shard behind it."""
    at = record.at
    if record.values != "full":
        skipped.append(f"{record.name}: {BARE if record.values == 'stats' else SAMPLED}")
        return None
    try:
        return run.tensor(
            record.name, step=at.step, microbatch=at.microbatch, call=at.call, eval=at.eval
        ).clone(memory_format=torch.contiguous_format)
    except RunError as failure:
        skipped.append(f"{record.name}: {str(failure).rstrip('.')}")
        return None


def _others(moments: Iterable[Moment], chosen: Moment) -> list[str]:
    """The forwards that are not in the folder."""
    reason = f"this layout holds one forward, and {_when(chosen)} was written"
    return [f"{_when(one)}: {reason}" for one in sorted(moments) if one != chosen]


def _when(moment: Moment) -> str:
    step, microbatch, call, evaluation = moment
    words = [f"step {step}", f"microbatch {microbatch}"]
    return " ".join(words + [f"call {call}"] * (call > 0) + ["eval"] * evaluation)


def _metadata(
    run: Run, at: Moment, records: Mapping[str, TensorRecord], written: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The keys of the older scripts, in plain data, and what an import needs to undo this."""
    info = run.info
    said = info.metadata
    content: dict[str, Any] = {
        "prompt": _prompt(said, at[0]),
        "input_ids": _matrix(_token_ids(said, at[0])),
        "attention_mask": _mask(said, records, written),
        "config": plain(info.model_config),
        "statistics": {what: described(values) for what, values in written.items()},
        OURS: {**_ours(info, at), "records": {what: _record(records[what]) for what in written}},
    }
    if "compiler_flags" in said:
        content["compiler_flags"] = plain(said["compiler_flags"])
    return {key: value for key, value in content.items() if value is not None}


def _ours(info: RunInfo, at: Moment) -> dict[str, Any]:
    return {
        "created": info.created,
        "model_class": info.model_class,
        "mode": info.mode or "",
        "format": info.format or "",
        "versions": plain(info.versions),
        "settings": plain(info.settings),
        "metadata": plain(info.metadata),
        "step": at[0],
        "microbatch": at[1],
        "eval": at[3],
    }


def _record(record: TensorRecord) -> dict[str, Any]:
    valid = {} if record.placement is None else record.placement.valid
    return {
        "name": str(record.name),
        "native": record.native,
        "dims": record.dims or "",
        "device": record.device,
        "valid": {str(axis % len(record.shape)): length for axis, length in valid.items()},
    }


def _prompt(said: Mapping[str, Any], step: int) -> Any:
    """The prompt of a run of one, or that of its step where the run lists several."""
    if "prompt" in said:
        return plain(said["prompt"])
    return _of_step(said.get("prompts", _inputs(said).get("text")), step)


def _token_ids(said: Mapping[str, Any], step: int) -> Any:
    for key in ("token_ids", "input_ids"):
        if key in said:
            return said[key]
    return _of_step(_inputs(said).get("token_ids"), step)


def _inputs(said: Mapping[str, Any]) -> Mapping[str, Any]:
    found = said.get("inputs")
    return found if isinstance(found, Mapping) else {}


def _of_step(found: Any, step: int) -> Any:
    return found[step] if isinstance(found, list) and step < len(found) else None


def _matrix(found: Any) -> Any:
    """Token ids as a tensor [batch, sequence]; rows of several lengths stay lists."""
    if not isinstance(found, list) or not found:
        return None
    rows = found if isinstance(found[0], list) else [found]
    good = all(isinstance(row, list) and all(type(one) is int for one in row) for row in rows)
    if not good or len({len(row) for row in rows}) > 1:
        return plain(found)
    return torch.tensor(rows, dtype=torch.int64)


def _mask(
    said: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
    written: Mapping[str, torch.Tensor],
) -> Any:
    """The run's own mask, or one that says where its tensors are padded."""
    if "attention_mask" in said:
        return _matrix(said["attention_mask"])
    for what, values in written.items():
        placement = records[what].placement
        valid = None if placement is None else placement.valid.get(1)
        if valid is not None and values.dim() == 3:
            mask = torch.zeros(values.shape[:2], dtype=torch.int64)
            mask[:, :valid] = 1
            return mask
    return None


def described(values: torch.Tensor) -> dict[str, Any]:
    """The statistics of the older scripts, in float64: NaN where there is one, `std` unbiased."""
    about = {"shape": list(values.shape), "dtype": str(values.dtype)}
    if not values.numel() or values.is_complex():
        return {**about, "error": "no statistics of an empty or complex tensor"}
    wide = values.double()
    return {
        **about,
        "mean": float(wide.mean()),
        "std": float(wide.std()) if wide.numel() > 1 else float("nan"),
        "min": float(wide.min()),
        "max": float(wide.max()),
        "has_nan": bool(wide.isnan().any()),
        "has_inf": bool(wide.isinf().any()),
    }
