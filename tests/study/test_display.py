"""What a running study shows on a terminal and elsewhere."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from flanmoe.core.console import Progressed
from flanmoe.core.errors import UserError
from flanmoe.study.board import Board
from flanmoe.study.display import LiveDisplay, PlainDisplay, state_line, study_table
from flanmoe.study.nodes import Branch, Node, StageGraph


def node(name: str, parent: str | None = None) -> Node:
    """A stage that is planned to take a minute."""
    return Node(
        key=name,
        label=name.partition("-")[0],
        kind="tune",
        parent=parent,
        model=None,
        changes_model=True,
        settings={},
        seed=0,
        files={},
        code="",
        versions={},
        lengths=(64, None),
        seconds=60.0,
    )


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """A shared stage that is done; one arm that runs, one that failed, one that waits."""
    names = ("a", "b", "c")
    nodes = [node("start"), *(node(f"tune-{name}", "start") for name in names)]
    nodes += [node(f"score-{name}", f"tune-{name}") for name in names]
    branches = [Branch(name, 0, ("start", f"tune-{name}", f"score-{name}")) for name in names]
    graph = StageGraph({one.key: one for one in nodes}, tuple(branches))
    graph.write(tmp_path)
    found = Board(tmp_path, graph, workers=1)
    (found.folder("start") / "result.json").write_text('{"seconds": 30.0}')
    found.refresh()
    found.began(("tune-a", "score-a"))
    found.failures["tune-b"] = UserError("Gone.")
    return found


def test_the_line_counts_every_state(board: Board) -> None:
    # Half of the plan's time was taken: three stages are left, one of them in hand, at half a minute each.
    assert state_line(board) == (
        "1 of 7 stages done, 1 running, 3 waiting, 1 failed, 1 stopped; about 2 min left"
    )
    board.elsewhere.add("tune-c")
    assert "1 running, 1 elsewhere, 2 waiting" in state_line(board)


def drawn(board: Board) -> list[str]:
    """The table as text."""
    screen = Console(file=io.StringIO(), width=100, force_terminal=False)
    screen.print(study_table(board))
    text = screen.file.getvalue()
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_table_has_a_row_an_arm_with_the_state_of_each_stage(board: Board) -> None:
    assert drawn(board) == [
        "arm seed stages",
        "a 0 ✓ start ▶ tune · score",
        "b 0 ✓ start ✗ tune — score",
        "c 0 ✓ start · tune · score",
    ]


def test_many_arms_and_seeds_are_counted(board: Board) -> None:
    many = tuple(
        Branch(branch.arm, seed, branch.stages)
        for branch in board.graph.branches
        for seed in range(5)
    )
    large = Board(board.study_dir, StageGraph(board.graph.nodes, many), workers=1)
    large.refresh()
    assert drawn(large) == ["arm done waiting", "a 1 2", "b 1 2", "c 1 2"]


def test_elsewhere_than_on_a_terminal_a_line_is_printed_when_something_has_changed(
    board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    display = PlainDisplay()
    with display.showing(board):
        for _ in range(3):
            display.update(board)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_on_a_terminal_lines_stand_above_the_table_and_bars_below(board: Board) -> None:
    screen = Console(file=io.StringIO(), width=110, force_terminal=True, color_system=None)
    display = LiveDisplay(screen)
    name = "Arm `a` (seed 0)"
    with display.showing(board):
        display.said("  tune")
        display.progressed(name, Progressed("Tuning", 3, 8, "steps", f"loss 2.5 {'long ' * 30}"))
        display.update(board)
        display._live.refresh()
        shown = screen.file.getvalue()
        display.progressed(name, Progressed("Tuning", 7, 8, "steps", "", has_ended=True))
        assert display._tasks == {}
        display.progressed(name, Progressed("upcycling", 1, 3, "parts", ""))
        display.ended(name)
        assert display._tasks == {}
    assert re.search(
        r"^  tune$", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", shown).replace("\r", ""), re.M
    )
    assert "Arm a (seed 0): Tuning" in shown
    assert re.search(r"Tuning ━+.* 3/8 steps", shown)
    assert "loss 2.5" in shown
    assert shown.index("▶ tune") < shown.index("3/8 steps")
    # What stays on the screen is the table without bars.
    left = screen.file.getvalue().rsplit("arm", 1)[1]
    assert "✗ tune" in left
    assert "steps" not in left
