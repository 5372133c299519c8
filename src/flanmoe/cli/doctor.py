"""`flanmoe doctor`: known MoE defects, measured in the installed libraries and in a model."""

from typing import Annotated

import typer

from flanmoe.cli.options import AsJson
from flanmoe.cli.output import machine_output


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Also look at this model: a folder or a hub id.")
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option(help="Run this check alone. Repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Probe the installed transformers, TRL and PEFT for known defects with sparse models.

    Each check gives the measured figure, what it should be, what it means for a run, and the way out. The exit
    status is 0 when the checks have run, whatever they found: `--json` has a `status` for each.

    Example: flanmoe doctor models/smol-moe
    """
    from flanmoe.stages.doctor.doctor import examine

    with machine_output(as_json) as emit:
        emit(examine(model, names=list(check or ())))
