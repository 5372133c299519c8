"""Options that several verbs share, so that they read the same everywhere."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from flanmoe.core.errors import ConfigError

AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout; everything else goes to stderr."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="FLANMOE_DATA",
        help="Folder with <name>/<split>.jsonl[.gz] or .parquet data sets.",
    ),
]
OutputDir = Annotated[
    Path | None, typer.Option("--out", help="Folder to write; must be new, or use --resume.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what an earlier run in this folder left.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the file, e.g. defaults.tune.train.steps=8. Repeatable.",
    ),
]
Profile = Annotated[
    str | None, typer.Option("--profile", help="A named set of changes from the file's `profiles`.")
]
Workers = Annotated[
    int,
    typer.Option(
        min=1,
        help="How many processes run stages at a time. On this machine only as many as fit into memory by the "
        "plan; they share its cores.",
    ),
]


def split_option(default: str) -> Any:
    """Return the option `--split`; `default` is taken for tasks that have splits."""
    return typer.Option(
        "--split", help="Split of tasks from the data folder or the hub.", show_default=default
    )


def refuse_without_effect(context: typer.Context, *, used: Collection[str], beside: str) -> None:
    """Refuse what the user wrote on the command line although it means nothing beside something else.

    A value from the environment is not meant for one command and passes.

    Args:
        context: of the command.
        used: parameters that do mean something, as Python spells them.
        beside: what makes the others meaningless, for the message.

    Raises:
        ConfigError: names the first one.
    """
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in used and source is not None and source.name == "COMMANDLINE":
            written = parameter.opts[0]
            spelled = written if written.startswith("-") else written.upper()
            raise ConfigError(f"`{spelled}` has no effect beside {beside}. Leave it out.")
