"""The table of the capture benchmark, on the terminal and in RESULTS.md."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
SMALL_RUN = 256 << 20
"""Below this, bytes on disk are not held against the payloads."""

BUDGETS = {
    "disabled": 1.00,
    "nothing-selected": 1.00,
    "stats": 1.10,
    "full": 2.00,
}
"""The most a lane may cost, in untapped steps."""
NOISE = 0.02
"""A lane without any hook lies within this of 1.00 on a quiet machine."""


@dataclass(frozen=True, slots=True)
class Row:
    """One lane: times in seconds, sizes in bytes, ratios to the untapped step."""

    lane: str
    ratio: float
    spread: tuple[float, float]
    fastest: float
    median: float
    extra_memory: float
    tensors: float
    written: float
    unique: float
    wall: float
    untapped_wall: float
    plain_write: float | None

    @property
    def disk_ratio(self) -> float | None:
        """The whole lane, closing included, over the longer of plain training and plain writing."""
        if self.plain_write is None:
            return None
        return self.wall / max(self.untapped_wall, self.plain_write)

    @property
    def overhead_on_disk(self) -> float | None:
        """Bytes on disk over bytes of unique payloads."""
        return self.written / self.unique if self.unique else None


HEADINGS = (
    "lane", "step", "ratio", "range", "fastest", "memory", "tensors", "written", "on disk",
    "wall", "plain write", "floor",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table, in the order of `HEADINGS`; README.md says what they mean."""
    return (
        row.lane,
        f"{row.median:.3f} s",
        f"{row.ratio:.3f}",
        f"{row.spread[0]:.2f}-{row.spread[1]:.2f}",
        f"{row.fastest:.3f}",
        f"{row.extra_memory / 2**20:+.0f} MiB",
        f"{row.tensors:.0f}",
        f"{row.written / 1e6:.1f} MB",
        _optional(row.overhead_on_disk, ".4f"),
        f"{row.wall:.1f} s",
        _optional(row.plain_write, ".1f", " s"),
        _optional(row.disk_ratio, ".2f"),
    )


def _optional(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence for each budget that was measured: kept or missed, and by how much."""
    said = []
    for row in rows:
        if row.lane in BUDGETS:
            allowed = BUDGETS[row.lane]
            kept = row.ratio <= allowed + (NOISE if allowed == 1 else 0)
            said.append(f"{_word(kept)}: {row.lane} {row.ratio:.3f}x, allowed {allowed:.2f}x")
        if row.lane == "full":
            said += [_disk_speed(row), _disk_space(row)]
    return [verdict for verdict in said if verdict]


def _disk_speed(row: Row) -> str:
    if row.plain_write is None:
        return ""
    slower = row.wall / row.plain_write
    if row.plain_write < row.untapped_wall:
        return f"the disk does not limit full: a plain write of its bytes is {slower:.1f}x faster"
    return f"{_word(slower <= 1.3)}: full takes {slower:.2f}x a plain write, allowed 1.30x"


def _disk_space(row: Row) -> str:
    if row.overhead_on_disk is None or row.written < SMALL_RUN:
        return ""
    kept = row.overhead_on_disk <= 1.02
    return f"{_word(kept)}: full {row.overhead_on_disk:.4f} bytes on disk a byte, allowed 1.02"


def _word(kept: bool) -> str:
    return "kept" if kept else "MISSED"


def show(rows: Sequence[Row]) -> None:
    """Print the table and the verdicts."""
    table = Table()
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "lane" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    for verdict in verdicts(rows):
        console.print(verdict, highlight=False)


def machine(scratch: Path) -> dict[str, str]:
    """Where and when: processor, memory, kernel, load before the start, commit."""
    load = os.getloadavg()[0]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load before": f"{load:.2f}" + ("" if load < 0.5 else " (NOT QUIET: do not keep this)"),
    }


def processor() -> str:
    """The processor's model as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is checked out, marked when files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "not a git checkout"


def write_results(out: Path, rows: Sequence[Row], facts: Mapping[str, str]) -> None:
    """Write `out`: the table, the verdicts and what it was measured with."""
    lines = [
        "# What capturing costs",
        "",
        "Written by `make bench`; [README.md](README.md) says how to read it.",
        "",
        _markdown(HEADINGS),
        _markdown(["---"] + ["---:"] * (len(HEADINGS) - 1)),
        *(_markdown(cells(row)) for row in rows),
        "",
        *(f"- {verdict}" for verdict in verdicts(rows)),
        "",
        "| measured with | |",
        "|---|---|",
        *(_markdown([key, value]) for key, value in facts.items()),
    ]
    out.write_text("\n".join(lines) + "\n")


def _markdown(texts: Sequence[str]) -> str:
    return "| " + " | ".join(texts) + " |"
