"""`flanmoe run`: build, tune, evaluate and report a recipe or a study."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flanmoe.cli.options import (
    AsJson,
    DataDir,
    OutputDir,
    Overrides,
    Profile,
    Resume,
    Workers,
)
from flanmoe.cli.output import Refusal, machine_output


def run(
    file: Annotated[
        Path, typer.Argument(help="A recipe or a study, e.g. recipes/quickstart.yaml.")
    ],
    out: OutputDir = None,
    data_dir: DataDir = None,
    resume: Resume = False,
    profile: Profile = None,
    overrides: Overrides = None,
    executor: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="Where stages run: as processes of this machine, or as tasks of Ray (RAY_ADDRESS names a "
            "cluster)."
        ),
    ] = "local",
    workers: Workers = 1,
    as_json: AsJson = False,
) -> None:
    """Run a recipe or a study and write its report.

    The folder (runs/NAME unless --out says otherwise) gets the resolved recipe, versions, metrics as
    JSON lines, checkpoints, models, and report.html, report.md, report.json. Ctrl-C saves a checkpoint; the
    same command with --resume goes on from it and ends with the same weights. Stages that have finished are
    not run again, and after a change of the file only those that it changes are. A stage that fails stops the
    arms that need it and no others.

    Example: flanmoe run recipes/quickstart.yaml --set defaults.tune.train.steps=8 --out runs/short
    """
    from flanmoe.study.launch import run_file
    from flanmoe.study.schedule import StudyError

    with machine_output(as_json) as emit:
        try:
            emit(
                run_file(
                    file,
                    out,
                    overrides=overrides or [],
                    profile=profile,
                    data_dir=data_dir,
                    resume=resume,
                    executor=executor,
                    workers=workers,
                )
            )
        except StudyError as error:
            raise Refusal(str(error), error.told, exit_code=error.exit_code) from error
