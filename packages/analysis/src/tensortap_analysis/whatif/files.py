"""What formats do to tensors, as JSON, CSV or Markdown."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tensortap.errors import ConfigError
from tensortap.records import encode_float
from tensortap_analysis.outputs import require_writable
from tensortap_analysis.rendering import rendered
from tensortap_analysis.whatif.judging import Expected, WhatIf
from tensortap_analysis.whatif.tables import by_tensor

_COLUMNS = tuple(field.name for field in fields(Expected))


def document(found: WhatIf, threshold_db: float) -> dict[str, Any]:
    """All rows, and what each tensor needs, as plain JSON."""
    return {
        "threshold_db": threshold_db,
        "rows": [asdict(row) | {"sqnr_db": encode_float(row.sqnr_db)} for row in found.rows],
        "needs": {one.name: one.needed(threshold_db) for one in by_tensor(found)},
        "skipped": list(found.skipped),
        "problems": list(found.problems),
    }


def writer(out: Path | None) -> Callable[[WhatIf, float], None]:
    """Writes to `out` by its ending; raises `ConfigError` before any work is done."""
    if out is None:
        return lambda found, threshold_db: None
    writers = {".csv": _write_csv, ".md": _write_markdown, ".json": _write_json}
    if out.suffix not in writers:
        raise ConfigError(f"--out {out}: the file must end in {', '.join(writers)}.")
    require_writable(out)
    return lambda found, threshold_db: writers[out.suffix](out, found, threshold_db)


def _write_csv(out: Path, found: WhatIf, threshold_db: float) -> None:
    with out.open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, _COLUMNS)
        rows.writeheader()
        rows.writerows(asdict(row) for row in found.rows)


def _write_markdown(out: Path, found: WhatIf, threshold_db: float) -> None:
    rows = [asdict(row) for row in found.rows]
    table = rendered(rows, "markdown", {name: name for name in _COLUMNS})
    out.write_text(f"{table}\n", encoding="utf-8")


def _write_json(out: Path, found: WhatIf, threshold_db: float) -> None:
    out.write_text(json.dumps(document(found, threshold_db), indent=2) + "\n", encoding="utf-8")
