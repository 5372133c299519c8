"""The command `flanmoe`: one verb a file, errors as one sentence, exit statuses as documented.

Exit status 0 means success, 2 a mistake of the user, 130 Ctrl-C with the state saved, 1 anything else.
"""

import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer import rich_utils

from flanmoe.cli.chat import chat
from flanmoe.cli.data import data_app
from flanmoe.cli.doctor import doctor
from flanmoe.cli.eval import evaluate
from flanmoe.cli.export import export
from flanmoe.cli.inspect import inspect
from flanmoe.cli.output import Refusal
from flanmoe.cli.plan import plan
from flanmoe.cli.quickstart import quickstart
from flanmoe.cli.report import report
from flanmoe.cli.run import run
from flanmoe.cli.upcycle import upcycle
from flanmoe.core.errors import FlanmoeError, unexpected

app = typer.Typer(
    name="flanmoe",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Turn a dense or sparse language model into an instruction-tuned Mixture-of-Experts; know what it "
        "costs before, and whether it was worth it after.\n\n"
        "Start with [bold]flanmoe quickstart[/bold] (15 minutes on 2 CPU cores), then "
        "[bold]flanmoe plan recipes/quickstart.yaml[/bold] and "
        "[bold]flanmoe run recipes/quickstart.yaml[/bold] with changes of your own."
    ),
)
app.command()(quickstart)
app.command()(run)
app.command()(plan)
app.command()(doctor)
app.command()(upcycle)
app.command()(export)
app.command(name="eval")(evaluate)
app.command()(inspect)
app.command()(report)
app.command()(chat)
app.add_typer(data_app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("flanmoe"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options that stand before a verb."""


def main() -> None:
    """Entry point of the command; never returns."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """Run one command line and return its exit status; errors become one sentence on stderr."""
    try:
        return app(arguments, standalone_mode=False, prog_name="flanmoe") or 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Stopped by Ctrl-C.", 130, arguments)
    except typer.TyperException as error:
        # Typed for click's own errors; typer raises its subclasses of this one.
        rich_utils.rich_format_error(error)  # pyright: ignore[reportArgumentType]
        return _fail(error.format_message(), 2, arguments, shown=True)
    except Refusal as error:
        return _fail(str(error), error.exit_code, arguments, told=error.told)
    except FlanmoeError as error:
        return _fail(str(error), error.exit_code, arguments)
    except BrokenPipeError:
        # The reader went away (`flanmoe ... | head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("FLANMOE_TRACEBACK"):
            traceback.print_exc()
        return _fail(unexpected(error), 1, arguments)


def _fail(
    message: str,
    status: int,
    arguments: list[str],
    *,
    shown: bool = False,
    told: Mapping[str, Any] | None = None,
) -> int:
    if not shown:
        print(f"Error: {message}" if status != 130 else message, file=sys.stderr)
    if "--json" in arguments:
        said = {**(told or {}), "error": message, "exit_status": status}
        print(json.dumps(said, ensure_ascii=False))
    return status
