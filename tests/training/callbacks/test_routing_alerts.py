"""Alerts are said once on the terminal, one line a kind, by one process, and not again after a resume."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.alerts import AlertConfig
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.callbacks.routing_alerts import RoutingAlerts
from flanmoe.training.report import StepReport

Report = Callable[..., StepReport]


def watching(*, is_shown: bool = True) -> RoutingAlerts:
    blocks = moe_blocks(tiny_model("mixtral", num_local_experts=3))
    config = AlertConfig(window_steps=2, dead_steps=1000, min_evenness=0.0, max_busiest=1.0)
    return RoutingAlerts(config, blocks, is_shown=is_shown)


def dropping(made: StepReport, *layers: int) -> StepReport:
    """A step of 300 tokens in which those layers drop a third of what is asked for."""

    def sums(layer: int) -> RoutingSums:
        dropped = 200 if layer in layers else 0
        kept = (600 - dropped) // 3
        none = RoutingSums.none(1, 3).tensors()
        numbers = {"tokens": 300, "asked": 600, "dropped": dropped}
        own = {name: torch.tensor([value]) for name, value in numbers.items()}
        assignments = torch.tensor([[kept, kept, kept + (600 - dropped) % 3]])
        return RoutingSums(**(none | own | {"assignments": assignments}))

    assert made.router is not None
    return replace(made, router=replace(made.router, routing=(sums(0), sums(1))))


def test_each_alert_is_said_once(report: Report, capfd: pytest.CaptureFixture[str]) -> None:
    alerts = watching()
    for step in range(1, 9):
        alerts.after_step(dropping(report(step), 1))
    said = capfd.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "Warning: step 2: 33 % of the choices of layer 1 (model.layers.1.mlp) did not fit"
    )
    assert (
        [alert.kind for alert in alerts.up] == [alert.kind for alert in alerts.alerts] == ["drops"]
    )


def test_layers_with_the_same_trouble_are_one_line(
    report: Report, capfd: pytest.CaptureFixture[str]
) -> None:
    alerts = watching()
    for step in (1, 2):
        alerts.after_step(dropping(report(step), 0, 1))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("Warning: step 2: 33 % of the choices of layer 0")
    assert line.endswith("The same kind of alert (drops) is up in model.layers.1.mlp.")


def test_only_one_process_says_it(report: Report, capfd: pytest.CaptureFixture[str]) -> None:
    alerts = watching(is_shown=False)
    for step in (1, 2):
        alerts.after_step(dropping(report(step), 0))
    assert capfd.readouterr().err == ""
    assert len(alerts.up) == 1


def test_what_was_said_is_not_said_after_a_resume(
    report: Report, capfd: pytest.CaptureFixture[str]
) -> None:
    first = watching()
    for step in (1, 2, 3):
        first.after_step(dropping(report(step), 0))
    capfd.readouterr()
    second = watching()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in (4, 5, 6):
        second.after_step(dropping(report(step), 0))
    assert capfd.readouterr().err == ""
    assert second.alerts[0].step == 2


def test_steps_without_routing_are_let_pass(report: Report) -> None:
    alerts = watching()
    alerts.after_step(report(1, sparse=False))
    made = report(2)
    assert made.router is not None
    alerts.after_step(replace(made, router=replace(made.router, routing=(), measures=())))
    assert alerts.state_dict()["steps"] == 0
