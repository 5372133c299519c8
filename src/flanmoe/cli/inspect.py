"""`flanmoe inspect`: who goes to which expert."""

from pathlib import Path
from typing import Annotated

import typer

from flanmoe.cli.options import AsJson, DataDir, split_option
from flanmoe.cli.output import machine_output

_USUAL_TASKS = ("exemplars/gsm8k_cot", "exemplars/mmlu_cot/anatomy")


def inspect(
    model: Annotated[str, typer.Argument(help="A sparse model: a folder or a hub id.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task whose examples are sent through the model. Repeatable; two or more are compared.",
            show_default=" and ".join(_USUAL_TASKS),
        ),
    ] = None,
    split: Annotated[str | None, split_option("train")] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Examples of each task, drawn at random, the same each time.")
    ] = 32,
    length: Annotated[
        int,
        typer.Option(min=2, help="Most tokens of an example that are read; also those of a row."),
    ] = 1024,
    share: Annotated[
        float,
        typer.Option(help="A task needs the fewest experts that hold this share of its gate mass."),
    ] = 0.9,
    coactivation: Annotated[
        bool,
        typer.Option("--coactivation", help="Count which experts serve tokens together."),
    ] = False,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="New folder for pictures, inspect.json and the statistics."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which experts each task uses, how far tasks lie apart, and which experts a task needs.

    Examples of each task go once through the model, rendered as for training. Tables show, layer by layer and
    task by task, who goes where, how sure routers are, what is dropped and what lies idle; warnings say what
    is wrong in words. An upcycled model and its tuned successor, inspected alike, show what tuning did.

    Example: flanmoe inspect models/smol-moe --data-dir data --task gsm8k --task banking77 --out looks/smol
    """
    from flanmoe.stages.inspect import InspectConfig, inspect_reference

    with machine_output(as_json) as emit:
        values = {"limit": limit, "length": length, "share": share, "coactivation": coactivation}
        config = InspectConfig.parse(values, origin="The command line")
        names = list(task or _USUAL_TASKS)
        emit(inspect_reference(model, names, config, split=split, data_dir=data_dir, out=out))
