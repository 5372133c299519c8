"""Terminal output goes to stderr, and off a terminal it is plain lines."""

import io
import itertools
import re

import pytest
from rich.console import Console
from rich.table import Table

from flanmoe.core import console


def test_nothing_reaches_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name")
    table.add_row("dense")
    console.say("a line")
    console.warn("a warning")
    console.show_table(table)
    with console.progress("Tuning", total=1, unit="steps") as advance:
        advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a line\n" in captured.err
    assert "Warning: a warning\n" in captured.err
    assert "dense" in captured.err
    assert "\x1b" not in captured.err


def test_a_long_line_stays_one_line_and_is_not_read_as_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = "word " * 60 + "[bold]not markup[/bold] https://example.org/[x]"
    console.say(message)
    assert capsys.readouterr().err == f"{message}\n"


def _ticking(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    clock = itertools.count(0.0, seconds)
    monkeypatch.setattr("flanmoe.core.console.time.monotonic", lambda: next(clock))


def test_plain_progress_comes_now_and_then_and_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ticking(monkeypatch, 4.0)
    with console.progress("Tuning", total=10, unit="steps") as advance:
        for step in range(10):
            advance(note=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    # One call every 4 seconds and a line every 15: after 16 and 32 seconds, and for the last step.
    assert lines == [
        "Tuning: 4/10 steps, 0.25 steps/s, 24 s left loss 3",
        "Tuning: 8/10 steps, 0.25 steps/s, 8 s left loss 7",
        "Tuning: 10/10 steps, 0.25 steps/s, 0 s left loss 9",
    ]


def test_an_amount_counts_as_often_as_it_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _ticking(monkeypatch, 2.0)
    with console.progress("Scoring", total=64, unit="questions") as advance:
        advance(32)
        advance(32)
    assert capsys.readouterr().err == "Scoring: 64/64 questions, 16 questions/s, 0 s left\n"


def test_a_terminal_gets_a_bar_with_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(console, "console", terminal)
    with console.progress("Tuning", total=3, unit="steps") as advance:
        for _ in range(3):
            advance(note="loss 1.25")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "Tuning" in shown
    assert "3/3" in shown
    assert "steps/s" in shown
    assert "loss 1.25" in shown


def test_a_parent_that_draws_is_told_and_nothing_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_listeners", [])
    told: list[tuple[int, str, bool]] = []
    console.tell_progress_to(lambda step: told.append((step.done, step.note, step.has_ended)))
    # Called every 0.15 seconds, it tells every other time, and always of the last part.
    _ticking(monkeypatch, 0.15)
    with console.progress("  Tuning", total=5, unit="steps") as advance:
        for step in range(5):
            advance(note=f"loss {step}")
    assert told == [
        (0, "", False),
        (1, "loss 0", False),
        (3, "loss 2", False),
        (5, "loss 4", False),
        (5, "", True),
    ]
    assert capsys.readouterr().err == ""
