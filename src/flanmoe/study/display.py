"""What a running study shows: plain lines, or on a terminal a table drawn anew, with a bar for each leg."""

import threading
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from flanmoe.core.console import Progressed, console, say
from flanmoe.study.board import Board, State
from flanmoe.study.nodes import Branch

_MARKS: dict[State, str] = {
    "done": "\N{CHECK MARK}",
    "running": "\N{BLACK RIGHT-POINTING TRIANGLE}",
    "elsewhere": "\N{WHITE RIGHT-POINTING TRIANGLE}",
    "waiting": "\N{MIDDLE DOT}",
    "failed": "\N{BALLOT X}",
    "stopped": "\N{EM DASH}",
}
_COLOURS: dict[State, str] = {"done": "green", "running": "cyan", "failed": "red"}
# Above so many arms and seeds the table has a row an arm.
_MOST_ROWS = 12
_REDRAWS_A_SECOND = 4


class Display(Protocol):
    """Shows how far a study is."""

    def showing(self, board: Board) -> AbstractContextManager[None]:
        """Show it inside a `with` block."""
        ...

    def update(self, board: Board) -> None:
        """Take in what has changed."""
        ...


class PlainDisplay:
    """A line whenever a stage has finished or failed."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None

    @contextmanager
    def showing(self, board: Board) -> Generator[None]:
        """Say how much there is to do, if anything is done already."""
        yield

    def update(self, board: Board) -> None:
        """Print a line if a stage has finished or failed since."""
        counts = board.counts()
        now = counts["done"], counts["failed"]
        if now != (self._last or (0, 0)):
            say(state_line(board))
        self._last = now


def state_line(board: Board) -> str:
    """Say how many stages are in which state, and how much time is left."""
    counts = board.counts()
    total = sum(counts.values())
    others = [f"{number} {state}" for state, number in counts.items() if number and state != "done"]
    left = board.seconds_left()
    time_left = "" if left is None or counts["done"] == total else f"; about {_time(left)} left"
    return (
        f"{counts['done']} of {total} stages done{''.join(f', {one}' for one in others)}{time_left}"
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class LiveDisplay:
    """A table of arms and their stages, a line of totals, and a bar for each long step of a leg.

    It takes the lines and the progress of child processes too (`child.Watch`): lines go above the table.
    """

    def __init__(self, screen: Console = console) -> None:
        self._screen = screen
        self._lock = threading.Lock()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            # It has what the others leave; a long one does not take the bar's room.
            TextColumn(
                "{task.fields[note]}",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            console=screen,
            expand=True,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._board: Board | None = None
        self._live: Live | None = None

    @contextmanager
    def showing(self, board: Board) -> Generator[None]:
        """Draw the table inside a `with` block."""
        self._board = board
        with Live(
            self._drawn(),
            console=self._screen,
            refresh_per_second=_REDRAWS_A_SECOND,
            transient=True,
        ) as self._live:
            yield
        self._screen.print(self._drawn(bars=False))

    def update(self, board: Board) -> None:
        """Draw what has changed."""
        if self._live is not None:
            self._live.update(self._drawn())

    def said(self, line: str) -> None:
        """Print a line of a child process above the table."""
        self._screen.print(line, markup=False, highlight=False, soft_wrap=True)

    def progressed(self, name: str, progress: Progressed) -> None:
        """Move the bar of a long step; it goes when the step has finished."""
        place = name, progress.title
        with self._lock:
            if place not in self._tasks:
                self._tasks[place] = self._bars.add_task(
                    f"{name.replace('`', '')}: {progress.title}",
                    total=progress.total,
                    unit=progress.unit,
                    note="",
                )
            task = self._tasks[place]
            self._bars.update(task, completed=progress.done, note=progress.note)
            if progress.has_ended:
                self._bars.remove_task(self._tasks.pop(place))

    def ended(self, name: str) -> None:
        """Take away the bars of a child process that has ended."""
        with self._lock:
            for place in [one for one in self._tasks if one[0] == name]:
                self._bars.remove_task(self._tasks.pop(place))

    def _drawn(self, *, bars: bool = True) -> RenderableType:
        if self._board is None:
            return ""
        parts: list[RenderableType] = [study_table(self._board), state_line(self._board)]
        return Group(*parts, self._bars) if bars else Group(*parts)


def study_table(board: Board) -> Table:
    """Return the table: a row an arm and seed with its stages; where there are many, an arm with counts."""
    branches = board.graph.branches
    table = Table(box=None, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    if len(branches) <= _MOST_ROWS:
        table.add_column("seed", justify="right")
        table.add_column("stages")
        for branch in branches:
            table.add_row(branch.arm, str(branch.seed), _stages(board, branch))
        return table
    counts = board.counts()
    states: list[State] = [state for state in counts if counts[state]]
    for state in states:
        table.add_column(state, justify="right")
    arms = dict.fromkeys(branch.arm for branch in branches)
    for arm in arms:
        own = [branch for branch in branches if branch.arm == arm]
        table.add_row(arm, *_counted(board, own, states))
    return table


def _stages(board: Board, branch: Branch) -> Text:
    text = Text()
    for key in branch.stages:
        state = board.state(key)
        label = board.graph.nodes[key].label
        text.append(f"{_MARKS[state]} {label}  ", style=_COLOURS.get(state, ""))
    return text


def _counted(board: Board, branches: Sequence[Branch], states: Sequence[State]) -> list[str]:
    keys = dict.fromkeys(key for branch in branches for key in branch.stages)
    found = [board.state(key) for key in keys]
    return [str(found.count(state)) if state in found else "" for state in states]
