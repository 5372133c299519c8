"""Cutting a JSON-lines file back to the step that a run goes on from."""

import json
from typing import Any

from flanmoe.core.rundir import RunDir


def keep_rows_until(run: RunDir, name: str, *, step: int) -> list[dict[str, Any]]:
    """Leave only the rows of steps up to `step` in a file, a torn last line out, and return them."""
    rows = [row for row in run.rows(name) if row["step"] <= step]
    if run.has(name):
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        run.write_text(name, "".join(lines))
    return rows
