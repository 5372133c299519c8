"""`flanmoe plan`: what a recipe or a study will cost, before anything runs."""

from pathlib import Path
from typing import Annotated

import typer

from flanmoe.cli.options import AsJson, DataDir, Overrides, Profile
from flanmoe.cli.output import Refusal, machine_output


def plan(
    file: Annotated[
        Path, typer.Argument(help="A recipe or a study, e.g. recipes/quickstart.yaml.")
    ],
    data_dir: DataDir = None,
    profile: Profile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print stages, parameters, memory, FLOPs, tokens, time and disk of every arm; run nothing.

    Exits with status 2 and the reasons when an arm does not fit the memory or the disk of this machine.

    Example: flanmoe plan recipes/quickstart.yaml --set defaults.tune.train.length=2048
    """
    from flanmoe.core.console import show_table
    from flanmoe.study.plan import plan_study, plan_tables
    from flanmoe.study.study_file import load_study

    with machine_output(as_json) as emit:
        planned = plan_study(load_study(file, overrides=overrides or [], profile=profile), data_dir)
        for table in plan_tables(planned):
            show_table(table)
        if planned.refusal:
            raise Refusal(planned.refusal, planned.to_mapping())
        emit(planned.to_mapping())
