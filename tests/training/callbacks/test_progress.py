"""The progress display moves one step at a time and says loss and rate."""

import re
from collections.abc import Callable

import pytest

from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.alerts import AlertConfig
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.callbacks.progress import ProgressDisplay, shown_progress
from flanmoe.training.callbacks.routing_alerts import RoutingAlerts
from flanmoe.training.report import StepReport


def test_each_step_advances_by_one(report: Callable[..., StepReport]) -> None:
    calls: list[tuple[int, str]] = []
    display = ProgressDisplay(lambda amount, note: calls.append((amount, note)))
    display.start(0)
    display.after_step(report(1, sparse=False))
    display.after_step(report(2, sparse=False, cross_entropy=2.25))
    assert [amount for amount, _ in calls] == [1, 1]
    assert re.fullmatch(r"loss 1\.500, \d+ tokens/s", calls[0][1])
    assert calls[1][1].startswith("loss 2.250")


def test_it_says_which_layer_is_worst_and_how_many_alerts_are_up(
    report: Callable[..., StepReport],
) -> None:
    notes: list[str] = []
    blocks = moe_blocks(tiny_model("mixtral", num_local_experts=3))
    alerts = RoutingAlerts(
        AlertConfig(window_steps=7, max_dropped_share=0.45), blocks, is_shown=False
    )
    display = ProgressDisplay(
        lambda amount, note: notes.append(note), layers=["0", "1"], alerts=alerts
    )
    for step in range(1, 8):
        alerts.after_step(report(step))
        display.after_step(report(step))
    worst = "; worst layer 0: busiest x2.2, entropy 51 %"
    assert notes[0].endswith(worst)
    # The second layer's experts choose; this first one drops half of what was asked for.
    assert notes[6].endswith(f"{worst}, {len(alerts.up)} alerts")
    assert "drops" in {alert.kind for alert in alerts.up}


def test_it_goes_to_stderr(
    report: Callable[..., StepReport], capfd: pytest.CaptureFixture[str]
) -> None:
    with shown_progress("Tuning", steps=1, layers=["0", "1"]) as display:
        display.start(0)
        display.after_step(report(1))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "Tuning: 1/1 steps" in captured.err
    assert "loss 1.500" in captured.err


def test_only_one_process_of_a_run_shows_it(
    report: Callable[..., StepReport], capfd: pytest.CaptureFixture[str]
) -> None:
    with shown_progress("Tuning", steps=1, is_shown=False, layers=["0", "1"]) as display:
        display.start(0)
        display.after_step(report(1))
    assert capfd.readouterr() == ("", "")
