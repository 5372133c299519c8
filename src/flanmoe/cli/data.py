"""`flanmoe data`: look at what will be trained on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flanmoe.cli.options import AsJson, DataDir, refuse_without_effect, split_option
from flanmoe.cli.output import Refusal, machine_output

if TYPE_CHECKING:
    from flanmoe.study.data_groups import DataGroup

data_app = typer.Typer(help="Look at what will be trained on.", no_args_is_help=True)

What = Annotated[
    str, typer.Argument(help="A task (exemplars/gsm8k_cot, gsm8k, a file) or a recipe file.")
]
Split = Annotated[str | None, split_option("train")]
Model = Annotated[str, typer.Option(help="The model whose chat template and tokenizer are used.")]
Length = Annotated[
    int, typer.Option(min=2, help="Tokens in a row, to count longer examples against.")
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Examples of a task whose length is taken, a fixed sample; else all."),
]

_MODEL = "smollm2-135m-instruct"
_LENGTH = 1024


@data_app.callback()
def _data() -> None:
    """Look at what will be trained on."""


@data_app.command()
def preview(
    context: typer.Context,
    what: What,
    split: Split = None,
    number: Annotated[int, typer.Option("-n", "--number", min=1, help="Examples to show.")] = 10,
    all_rejected: Annotated[
        bool, typer.Option("--all-rejected", help="Show every rejected record, not the first ten.")
    ] = False,
    model: Model = _MODEL,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show examples as the model will see them: the prompt dim, the part with loss bright.

    Records that cannot be read are counted and shown with file, line and reason; tuning stops at one unless
    its task says `on_bad_record: skip`.

    Example: flanmoe data preview gsm8k --data-dir my-data -n 2
    """
    from flanmoe.study.preview import PreviewConfig, preview_file, preview_task

    shown = PreviewConfig(number=number, all_rejected=all_rejected)
    with machine_output(as_json) as emit:
        if _is_file(what):
            used = ("what", "number", "all_rejected", "data_dir", "as_json")
            refuse_without_effect(context, used=used, beside=_beside(what))
            emit(preview_file(Path(what), shown=shown, data_dir=data_dir))
        else:
            emit(preview_task(what, split=split, model=model, shown=shown, data_dir=data_dir))


@data_app.command()
def stats(
    context: typer.Context,
    what: What,
    split: Split = None,
    limit: Limit = None,
    length: Length = _LENGTH,
    model: Model = _MODEL,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Count examples and measure them in characters and tokens, task by task.

    Of a recipe or a study: everything that it tunes on, with the share of the draws and of the tokens that each
    task gets, and everything that it scores on. Counts are always of all examples.

    Example: flanmoe data stats recipes/math-and-instructions.yaml --data-dir my-data --limit 1000
    """
    from flanmoe.study.data_stats import statistics_of
    from flanmoe.study.data_stats_text import show_statistics

    with machine_output(as_json) as emit:
        groups = _groups(context, what, split=split, model=model, length=length)
        found = statistics_of(groups, limit=limit, data_dir=data_dir)
        show_statistics(found)
        emit({"groups": [group.to_mapping() for group in found]})


@data_app.command()
def validate(
    context: typer.Context,
    what: What,
    split: Split = None,
    limit: Limit = None,
    length: Length = _LENGTH,
    model: Model = _MODEL,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Read everything and list what is wrong; exit with status 2 if anything is.

    Looks for records that cannot be used, files that break off, empty tasks, examples that repeat another of
    their task, examples longer than a row, tasks both tuned on and evaluated, and tuned examples that share 13
    words in a row with an evaluated one.

    Example: flanmoe data validate recipes/math-and-instructions.yaml --data-dir my-data
    """
    from flanmoe.study.data_check import check_data
    from flanmoe.study.data_findings import show_check

    with machine_output(as_json) as emit:
        groups = _groups(context, what, split=split, model=model, length=length)
        check = check_data(groups, limit=limit, data_dir=data_dir)
        show_check(check)
        if check.summary is not None:
            raise Refusal(check.summary, check.to_mapping())
        emit(check.to_mapping())


def _groups(
    context: typer.Context, what: str, *, split: str | None, model: str, length: int
) -> "tuple[DataGroup, ...]":
    from flanmoe.study.data_groups import group_of_task, groups_of_file

    if _is_file(what):
        used = ("what", "limit", "data_dir", "as_json")
        refuse_without_effect(context, used=used, beside=_beside(what))
        return groups_of_file(Path(what))
    return (group_of_task(what, split=split, model=model, packing_length=length),)


def _is_file(what: str) -> bool:
    return what.endswith((".yaml", ".yml"))


def _beside(what: str) -> str:
    return f"the file {what}, which names its own"
