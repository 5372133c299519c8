"""`flanmoe eval`: score a model on tasks, or compare two results."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flanmoe.cli.options import AsJson, DataDir, refuse_without_effect, split_option
from flanmoe.cli.output import machine_output
from flanmoe.core.errors import ConfigError


def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="smollm2-135m-instruct, a folder, or a hub id.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task by name, e.g. exemplars/bbh/* or arc_easy. Repeatable."),
    ] = None,
    split: Annotated[str | None, split_option("test")] = None,
    suite: Annotated[str | None, typer.Option(help="A named set of tasks: `held-out`.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Questions in all, the same share of every task.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Most texts in one forward pass; changes speed and memory.")
    ] = 8,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="bfloat16 is faster; compare only results of one precision."),
    ] = "float32",
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
            beside = "`--compare A B`, which reads two results"
            refuse_without_effect(context, used=("compare", "as_json"), beside=beside)
            emit(compare_folders(*compare))
            return
        if model is None:
            raise ConfigError("An evaluation needs a MODEL or `--compare A B`, but has neither.")
        settings = {"limit": limit, "batch_size": batch_size, "precision": precision}
        emit(
            evaluate_reference(
                model,
                list(task or []),
                suite=suite,
                split=split,
                settings=settings,
                data_dir=data_dir,
                out=out,
            )
        )
