"""The progress display moves one step at a time and says loss and rate."""

import re
from collections.abc import Callable

import pytest

from flanmoe.training.callbacks.progress import ProgressDisplay, shown_progress
from flanmoe.training.report import StepReport


def test_each_step_advances_by_one(report: Callable[..., StepReport]) -> None:
    calls: list[tuple[int, str]] = []
    display = ProgressDisplay(lambda amount, note: calls.append((amount, note)))
    display.start(0)
    display.after_step(report(1))
    display.after_step(report(2, cross_entropy=2.25))
    assert [amount for amount, _ in calls] == [1, 1]
    assert re.fullmatch(r"loss 1\.500, \d+ tokens/s", calls[0][1])
    assert calls[1][1].startswith("loss 2.250")


def test_it_goes_to_stderr(
    report: Callable[..., StepReport], capfd: pytest.CaptureFixture[str]
) -> None:
    with shown_progress("Tuning", steps=1) as display:
        display.start(0)
        display.after_step(report(1))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Tuning: 1/1 steps" in captured.err
    assert "loss 1.500" in captured.err


def test_only_one_process_of_a_run_shows_it(
    report: Callable[..., StepReport], capfd: pytest.CaptureFixture[str]
) -> None:
    with shown_progress("Tuning", steps=1, is_shown=False) as display:
        display.start(0)
        display.after_step(report(1))
    assert capfd.readouterr() == ("", "")
