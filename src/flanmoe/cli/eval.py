"""`flanmoe eval`: score a model on tasks, or compare two results."""

from pathlib import Path
from typing import Annotated

import typer

from flanmoe.cli.options import AsJson, DataDir
from flanmoe.cli.output import machine_output


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="smollm2-135m-instruct, a folder, or a hub id.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task by name, e.g. exemplars/bbh/* or arc_easy. Repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of tasks from the data folder.")] = "test",
    suite: Annotated[str | None, typer.Option(help="A named set of tasks: `held-out`.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions in all, the same share of every task.")
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result and every example.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Compare two result folders of the same questions."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a model: loss on the reference answer, and accuracy where there are choices.

    Every mean comes with its standard error. Examples that flanmoe trained the model on are marked and left out
    of the headline numbers. With --compare, two results are compared example by example.

    Example: flanmoe eval runs/quickstart/arms/sparse/seed-0/02-tune/model --suite held-out --out results/sparse
    """
    from flanmoe.stages.evaluate import compare_folders, evaluate_reference

    with machine_output(as_json) as emit:
        if compare is not None:
            emit(compare_folders(*compare))
            return
        if model is None:
            raise typer.BadParameter("name a MODEL, or two folders with --compare A B")
        names = list(task or [])
        emit(
            evaluate_reference(
                model, names, suite=suite, split=split, limit=limit, data_dir=data_dir, out=out
            )
        )
