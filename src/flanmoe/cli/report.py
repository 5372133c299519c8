"""`flanmoe report`: build the report of a run again."""

from pathlib import Path
from typing import Annotated

import typer

from flanmoe.cli.options import AsJson
from flanmoe.cli.output import machine_output


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `flanmoe run` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Write report.html, report.md and report.json of a run again, from what it recorded.

    Arms that have not finished are listed and left out.

    Example: flanmoe report runs/quickstart
    """
    from flanmoe.study.outcome import rebuild_report

    with machine_output(as_json) as emit:
        emit(rebuild_report(folder))
