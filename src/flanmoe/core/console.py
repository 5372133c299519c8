"""Terminal output: everything for people goes to stderr, so that stdout stays free for `--json`.

On a terminal, long steps show a bar with rate and time left. Elsewhere (a log file, CI) they print a plain
line now and then. A process whose parent draws the screen tells it instead (`tell_progress_to`).
"""

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Columns of what is no terminal, unless COLUMNS says otherwise: a log file has room.
_LOG_COLUMNS = 120


def _console() -> Console:
    made = Console(stderr=True)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _LOG_COLUMNS
    return made


console = _console()

Advance = Callable[..., None]
_SECONDS_BETWEEN_TOLD = 0.2


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far a long step has come.

    Attributes:
        title: what it does.
        done, total: parts done, and all of them.
        unit: what a part is.
        note: a short free text (a loss, a task name).
        has_ended: whether it is over, which may be before all parts are done.
    """

    title: str
    done: int
    total: int
    unit: str
    note: str
    has_ended: bool = False


_listeners: list[Callable[[Progressed], None]] = []


def tell_progress_to(listener: Callable[[Progressed], None]) -> None:
    """Tell a listener of all progress of this process from now on, in place of showing it."""
    _listeners[:] = [listener]


def say(message: str) -> None:
    """Print one line for people. It is never cut into several, so that a log can be searched."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print one warning line for people."""
    console.print(
        f"Warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True
    )


def show_table(table: RenderableType) -> None:
    """Print a table for people."""
    console.print(table)


@contextmanager
def progress(title: str, *, total: int, unit: str) -> Generator[Advance]:
    """Show the progress of a long step.

    Yields a function `advance(amount=1, note="")`. `note` is a short free text shown behind the bar (a
    loss, a task name).
    """
    if _listeners:
        with _telling(_listeners[0], title.strip(), total, unit) as advance:
            yield advance
    elif console.is_terminal:
        with _bar(title, total, unit) as advance:
            yield advance
    else:
        yield _plain_lines(title, total, unit)


@contextmanager
def _bar(title: str, total: int, unit: str) -> Generator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, rate="", note="")
        start = time.monotonic()
        done = 0

        def advance(amount: int = 1, note: str = "") -> None:
            nonlocal done
            done += amount
            rate = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=amount, rate=f"{rate:.3g} {unit}/s", note=note)

        yield advance


@contextmanager
def _telling(
    listener: Callable[[Progressed], None], title: str, total: int, unit: str
) -> Generator[Advance]:
    done = 0
    last = float("-inf")
    listener(Progressed(title, 0, total, unit, ""))

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_TOLD or done >= total:
            last = now
            listener(Progressed(title, done, total, unit, note))

    try:
        yield advance
    finally:
        listener(Progressed(title, done, total, unit, "", has_ended=True))


def _plain_lines(title: str, total: int, unit: str, *, every_seconds: float = 15.0) -> Advance:
    start = last = time.monotonic()
    done = 0

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last < every_seconds and done < total:
            return
        last = now
        rate = done / max(now - start, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        say(
            f"{title}: {done}/{total} {unit}, {rate:.3g} {unit}/s, {left:.0f} s left {note}".rstrip()
        )

    return advance
