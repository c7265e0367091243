"""What `tensortap scan --recommend` prints: as JSON for tools, as lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tensortap.errors import ConfigError
from tensortap_analysis.weights.command.tables import counted, shown
from tensortap_analysis.weights.options import chosen_methods
from tensortap_analysis.weights.recommend import (
    LowRank,
    QuantPlan,
    compression_plan,
    generate_quant_config,
    quant_plan,
    suggest_compression,
)
from tensortap_analysis.weights.recommend.classic import Suggestion
from tensortap_analysis.weights.recommend.schemes import SCHEMES
from tensortap_analysis.weights.result import ScanResult

KINDS = {"quant": "quantization", "compress": "spectral"}
"""What there is to recommend, and the method whose metrics decide it."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One recommendation: `document` is JSON, `lines` are rich markup."""

    document: Any
    lines: tuple[str, ...]


def check_advice(kind: str, methods: str, sqnr_db: float, error: float) -> None:
    """Raise `ConfigError` for what `advice` could not give after a scan with these `methods`."""
    if kind not in KINDS:
        raise ConfigError(f"--recommend {kind} is none of {', '.join(KINDS)}.")
    if KINDS[kind] not in chosen_methods(methods):
        raise ConfigError(f"--recommend {kind} needs --methods {KINDS[kind]}, or all.")
    if not (math.isfinite(sqnr_db) and sqnr_db > 0):
        raise ConfigError(f"--sqnr is a number of dB above 0, and {sqnr_db:g} is none.")
    if not 0 < error < 1:
        raise ConfigError(f"--error is a share between 0 and 1, and {error:g} is none.")


def advice(result: ScanResult, kind: str, preset: str, sqnr_db: float, error: float) -> Advice:
    """By the older guide's rules for the preset `classic`."""
    if kind == "quant" and preset == "classic":
        config = generate_quant_config(result)
        return Advice(config, tuple(_classic_lines(config)))
    if kind == "quant":
        plan = quant_plan(result, sqnr_db=sqnr_db, formats=_choices(result))
        return Advice(plan.to_json(), tuple(_quant_lines(plan)))
    if preset == "classic":
        found, all_ = (suggest_compression(result, most=most) for most in (error, math.inf))
        lines = (*map(_suggestion, found), *_refused(len(all_) - len(found), error))
        return Advice([asdict(one) for one in found], lines)
    ranks = compression_plan(result, error=error)
    return Advice([one.to_json() for one in ranks], tuple(_compress_lines(ranks, error)))


def _choices(result: ScanResult) -> list[str]:
    """Of the formats that were asked for those that can be recommended."""
    found = [name for name in SCHEMES if name in result.options.formats]
    if not found:
        asked = ", ".join(result.options.formats) or "no format"
        raise ConfigError(
            f"The scan was of {asked}, and --recommend quant chooses among {', '.join(SCHEMES)}: "
            "name one of them in --formats."
        )
    return found


def _classic_lines(config: dict[str, list[str]]) -> Iterator[str]:
    for words, layers in config.items():
        yield f"[bold]{words}[/] ({len(layers):,})"
        yield from (f"  {shown(layer)}" for layer in layers)


def _quant_lines(plan: QuantPlan) -> Iterator[str]:
    bits = "" if plan.bits is None else f", {plan.bits:.2f} bits a value"
    yield f"[bold]the cheapest format that keeps {plan.sqnr_db:g} dB[/]{bits}"
    for choice in plan.choices:
        chosen = choice.format or "as it is"
        why = f" ({choice.reason})" if choice.reason else ""
        sqnr = "" if choice.sqnr_db is None else f"  {choice.sqnr_db:.1f} dB"
        yield f"  {shown(choice.layer)}: [bold]{chosen}[/]{sqnr}[dim]{shown(why)}[/]"
    yield "[dim]--json prints it as config_groups and ignore for llm-compressor.[/]"


def _refused(count: int, error: float) -> Iterator[str]:
    """The guide's suggestions that are none."""
    if count:
        yield (
            f"{counted(count, 'layer', 'layers')} more would lose over {error:.0%} of the norm by "
            "the guide's rank; --error 0.99 shows them."
        )


def _suggestion(found: Suggestion) -> str:
    left = (
        "" if found.error is None else f"; rank {found.rank} leaves an error of {found.error:.0%}"
    )
    return (
        f"  {shown(found.layer)}: {found.method} of rank {found.rank}, said to save "
        f"{found.saving} % (stable over total rank {found.ratio:.2g}{left})"
    )


def _compress_lines(plans: Sequence[LowRank], error: float) -> Iterator[str]:
    saved = sum(plan.saved for plan in plans)
    if not plans:
        yield f"No layer bears a low rank with an error of {error:.0%} of its norm."
        return
    count = f"{counted(len(plans), 'layer bears', 'layers bear')} a low rank"
    yield f"[bold]{count} with an error of {error:.0%}[/]: {saved:,} values less"
    for plan in plans:
        others = ", ".join(f"{rank}: {left:.0%}" for rank, left in plan.errors.items())
        yield (
            f"  {shown(plan.layer)}: rank [bold]{plan.rank}[/] of {plan.full_rank}, error "
            f"{plan.error:.1%}, {plan.share:.0%} smaller [dim](errors by rank {others})[/]"
        )
