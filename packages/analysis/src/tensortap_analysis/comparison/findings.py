"""What a comparison found, in words for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tensortap.tables import grouped
from tensortap_analysis.comparison.blocks import block
from tensortap_analysis.comparison.outcome import RunComparison, counted
from tensortap_analysis.comparison.result import Comparison
from tensortap_analysis.comparison.tables import layers, telling_moment, tensors
from tensortap_analysis.judging.presets import preset

_WHO = {"ref": "only in REF", "run": "only in RUN", "both": "not comparable"}
_LOST = ("damaged", "unwritten")
_FEW = 8


def header(found: Comparison) -> str:
    """Who is compared with whom, and judged by what."""
    by = preset(found.preset, found.thresholds)
    limits = ", ".join(f"{key} {value:g}" for key, value in by.limits.items())
    says = by.says
    if by.name == "noise":
        known = found.noise is not None
        says = "error over the noise run's" if known else "error over an estimate of rounding"
    noise = f" (noise: {found.noise.title})" if found.noise is not None else ""
    return f"REF {found.ref.title}; judged by {by.name}: {says}; {limits}{noise}"


def findings(
    run: RunComparison, limit: int, *, details: bool, width: int | None = None
) -> Iterator[str]:
    """Lines on one run: divergence, layers, tensors, and what was not compared."""
    yield f"{run.run.title}: {verdict(run)}"
    yield from (f"  note: {note}" for note in run.notes)
    yield from _estimates(run)
    yield from (f"  {line}" for line in _parting(run))
    yield from _listed("abnormal", run.abnormal)
    yield from _listed("jump between layers", map(str, run.jumps))
    yield from _not_compared(run)
    if run.divergences and len(run.depth) > 1:
        yield from _by_depth(run)
    if details:
        yield from _blocks(run, limit)
    elif run.pairs:
        yield ""
        yield "The tensors, the worst first (of limit: error over its limit, beyond from 1 on):"
        yield tensors(run, "text", limit, width=width)
        if limit and len(run.pairs) > limit:
            all_of_them = f"{len(run.pairs):,} tensors"
            yield f"… the worst {limit} of {all_of_them}: --limit 0, --csv --details, --save."


def verdict(run: RunComparison) -> str:
    """`agrees (21 tensors)`: the verdict, and what it is about."""
    compared, total = len(run.pairs), len(run.pairs) + run.not_compared
    of = f"{compared:,} tensors" if not run.not_compared else f"{compared:,} of {total:,} tensors"
    kinds = sorted({pair.by for pair in run.pairs})
    how = f", by {' and '.join(kinds)}" if kinds != ["values"] else ""
    if not run.pairs:
        return "could not be compared"
    if run.verdict == "incomparable":
        return f"cannot be judged ({', '.join(_why_not(run))}; {of} compared{how})"
    if run.verdict == "agree":
        far = " as far as statistics tell" if "statistics" in kinds else ""
        return f"agrees{far} ({of}{' compared' if run.not_compared else ''}{how})"
    limits = " beyond limits" if run.divergences else ""
    beyond = f"{len(run.divergences):,} of " if run.divergences else ""
    parts = [f"{beyond}{compared:,} tensors{how}", *counted(run.of_kind("shape", "conflict"))]
    return f"differs{limits} ({', '.join(parts)})"


def _why_not(run: RunComparison) -> Iterator[str]:
    yield from counted(run.of_kind("damaged", "unwritten"))
    if run.undecided:
        yield f"{len(run.undecided):,} with statistics only"


def _estimates(run: RunComparison) -> Iterator[str]:
    if not run.estimated:
        return
    some = sum(judgement.estimated for judgement in run.judgements)
    if any(pair.noise is not None for pair in run.pairs):
        yield f"  {some:,} limits are an estimate of rounding, where the noise run does not tell."
    else:
        yield "  Limits are an estimate of what rounding does; --noise RUN measures it."


def _parting(run: RunComparison) -> Iterator[str]:
    first = run.first_divergence
    if first is None:
        return
    yield f"first divergence: {first}"
    local = list(dict.fromkeys(found.name for found in run.local))
    if local:
        yield f"local errors (added there): {_few(local)}"
    most = [f"{found.name} {found.local:.3g}" for found in run.suspects]
    if len(most) > 1:
        yield f"most was added by: {_few(most)}"
    inherited = len(run.divergences) - len(run.local) - len(run.unknown)
    yield f"inherited errors: {_tensors(inherited)}"
    if run.unknown:
        yield f"inherited or added there, not told: {_tensors(len(run.unknown))}"


def _tensors(count: int) -> str:
    return f"{count:,} tensor{'' if count == 1 else 's'}"


def _few(words: list[str]) -> str:
    more = f" and {len(words) - _FEW:,} more" if len(words) > _FEW else ""
    return ", ".join(words[:_FEW]) + more


def _not_compared(run: RunComparison) -> Iterator[str]:
    """Why, a line for what is alike; what cannot be read has a reason of its own each time."""
    unreadable = [one for one in run.unpaired if one.where == "both" and one.kind in _LOST]
    if unreadable:
        many = sum(one.count for one in unreadable)
        yield f"  cannot be read: {many:,} tensors, the first {unreadable[0].name}:"
        yield f"    {unreadable[0].reason}"
    for word, title in _WHO.items():
        rows = (
            (one.name, one.reason, one.count)
            for one in run.unpaired
            if one.where == word and one not in unreadable
        )
        yield from _listed(title, grouped(rows))


def _by_depth(run: RunComparison) -> Iterator[str]:
    moments = {row.at.renamed("") for row in run.depth}
    more = f" (the first that tells of {len(moments):,} moments; --json has all)"
    least = ", ≥ is at least" if any(row.least for row in run.depth) else ""
    at = f"{telling_moment(run)}{more if len(moments) > 1 else ''}"
    yield ""
    yield f"The error by depth, forward, {at}; all relative, ~ is an estimate{least}:"
    yield layers(run)


def _listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    every = list(lines)
    yield from (f"  {title}: {line}" for line in every[:_FEW])
    if len(every) > _FEW:
        yield f"  {title}: and {len(every) - _FEW:,} more lines (--json has all)"


def _blocks(run: RunComparison, limit: int) -> Iterator[str]:
    for pair, judgement in run.ranked[: limit or None]:
        yield ""
        yield block(pair, judgement)
