"""`flanmoe inspect`: who goes to which expert."""

from typing import Annotated

import typer

from flanmoe.cli.options import AsJson, DataDir, split_option
from flanmoe.cli.output import machine_output


def inspect(
    model: Annotated[str, typer.Argument(help="A sparse model: a folder or a hub id.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task whose examples are sent through the model. Repeatable."),
    ] = None,
    split: Annotated[str | None, split_option("train")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Examples of each task.")] = 32,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show parameters, and for each layer and task which share of the tokens every expert gets.

    Example: flanmoe inspect models/smol-moe --task exemplars/gsm8k_cot --task exemplars/mmlu_cot/anatomy
    """
    from flanmoe.stages.inspect import inspect_reference

    with machine_output(as_json) as emit:
        names = list(task or ["exemplars/gsm8k_cot"])
        emit(inspect_reference(model, names, split=split, limit=limit, data_dir=data_dir))
