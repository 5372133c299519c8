"""Options that several verbs share, so that they read the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

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
