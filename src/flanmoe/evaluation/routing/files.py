"""The files of a routing report."""

import json
import re
from pathlib import Path
from typing import Any

from flanmoe.core import files
from flanmoe.core.console import warn
from flanmoe.core.names import listing
from flanmoe.evaluation.routing.figure import routing_svg
from flanmoe.evaluation.routing.report import RoutingReport

ROUTING_FILE = "routing.json"
FIGURE_FILE = "routing.svg"

# A number a line makes a file several times as large, and nobody reads it.
_INNERMOST_LIST = re.compile(r"\[[^\[\]{}]*\]")


def write_routing(report: RoutingReport, folder: Path) -> Path:
    """Write a report as JSON and as a picture, and return the path of the JSON.

    Warns of tasks that nothing was recorded of; without any recorded task there is no picture.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    if report.not_recorded:
        warn(
            f"The routing of {listing(report.not_recorded, limit=6)} is not recorded: their tokens were "
            "computed for tasks before them, or in passes that cannot be listened to."
        )
    if report.tasks.rows:
        files.write_text(folder / FIGURE_FILE, routing_svg(report))
    # Last, so that it never stands there without its picture.
    write_lists_on_lines(folder / ROUTING_FILE, report.to_mapping())
    return folder / ROUTING_FILE


def write_lists_on_lines(path: Path, value: Any) -> None:
    """Write JSON atomically, every list of plain numbers on a line of its own.

    Raises:
        DiskError: if the disk is full or the folder cannot be written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    files.write_text(path, _INNERMOST_LIST.sub(_on_one_line, text) + "\n")


def _on_one_line(found: re.Match[str]) -> str:
    # Within a text JSON has no line breaks, so none of those are touched.
    return re.sub(r"\s*\n\s*", " ", found[0])
