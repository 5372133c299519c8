"""`flanmoe data`: look at what will be trained on."""

from pathlib import Path
from typing import Annotated

import typer

from flanmoe.cli.options import AsJson, DataDir, refuse_without_effect, split_option
from flanmoe.cli.output import machine_output

data_app = typer.Typer(help="Look at what will be trained on.", no_args_is_help=True)


@data_app.callback()
def _data() -> None:
    """Look at what will be trained on."""


@data_app.command()
def preview(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(help="A task (exemplars/gsm8k_cot, gsm8k, a file) or a recipe file.")
    ],
    split: Annotated[str | None, split_option("train")] = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Examples to show.")] = 3,
    model: Annotated[
        str, typer.Option(help="The model whose chat template is used.")
    ] = "smollm2-135m-instruct",
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show examples as the model will see them: the prompt dim, the part with loss bright.

    Records that cannot be read are counted and shown with the reason; tuning stops at one unless its task
    says `on_bad_record: skip`.

    Example: flanmoe data preview gsm8k --data-dir my-data -n 2
    """
    from flanmoe.study.preview import preview_file, preview_task

    with machine_output(as_json) as emit:
        if what.endswith((".yaml", ".yml")):
            refuse_without_effect(
                context,
                used=("what", "number", "data_dir", "as_json"),
                beside=f"the file {what}, which names its own",
            )
            emit(preview_file(Path(what), number=number, data_dir=data_dir))
        else:
            emit(preview_task(what, split=split, number=number, model=model, data_dir=data_dir))
