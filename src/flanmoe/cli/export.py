"""`flanmoe export`: a model as a checkpoint of transformers' own classes."""

from pathlib import Path
from typing import Annotated

import typer

from flanmoe.cli.options import AsJson
from flanmoe.cli.output import machine_output


def export(
    model: Annotated[str, typer.Argument(help="A folder that flanmoe wrote, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="New folder for the native checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Write a model in transformers' own classes, reload it and compare it before saying done.

    A FlanMoeT5 becomes a Switch, or a T5 if no layer is sparse, where these can say all that it says;
    otherwise every reason is listed and nothing is written. Decoders are native already: they are written and
    compared all the same.

    Example: flanmoe export runs/flan-switch/model exported/flan-switch
    """
    from flanmoe.stages.export import export_folder

    with machine_output(as_json) as emit:
        emit(export_folder(model, out))
