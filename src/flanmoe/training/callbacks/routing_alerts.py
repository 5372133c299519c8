"""Alerts about routing while a model trains: said once on the terminal, kept for the files and the result."""

from collections.abc import Mapping, Sequence
from typing import Any, final

from flanmoe.core.console import warn
from flanmoe.moe.alerts import Alert, AlertConfig, AlertMonitor
from flanmoe.moe.block import MoEBlock
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.report import StepReport
from flanmoe.training.routing_monitor import watched


@final
class RoutingAlerts(StepCallback):
    """Raises alerts; put before the callbacks that show them.

    Args:
        config: when routing is called wrong.
        blocks: the sparse blocks of the model, in layer order.
        is_shown: False in all but one process of a run, since all of them find the same.
    """

    name = "routing_alerts"

    def __init__(
        self, config: AlertConfig, blocks: Sequence[MoEBlock], *, is_shown: bool = True
    ) -> None:
        self._monitor = AlertMonitor(config, watched(blocks))
        self._is_shown = is_shown

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """Every alert of the run so far."""
        return self._monitor.alerts

    @property
    def up(self) -> tuple[Alert, ...]:
        """Those that have not been cleared."""
        return self._monitor.up

    def after_step(self, report: StepReport) -> None:
        """Judge the step with those before it; say what is new."""
        if report.router is None or not report.router.routing:
            return
        new = self._monitor.after_step(report.step, report.router.routing)
        if self._is_shown:
            for line in _lines(new):
                warn(f"step {report.step}: {line}")

    def state_dict(self) -> dict[str, Any]:
        """Return the alerts so far and the window in the making."""
        return self._monitor.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier part of the run; what has been said is not said again."""
        self._monitor.load_state_dict(state)


def _lines(alerts: Sequence[Alert]) -> list[str]:
    """One line for each kind: the words of the first, and where else."""
    by_kind: dict[str, list[Alert]] = {}
    for alert in alerts:
        by_kind.setdefault(alert.kind, []).append(alert)
    return [_line(alike) for alike in by_kind.values()]


def _line(alike: Sequence[Alert]) -> str:
    first, *others = alike
    if not others:
        return first.words
    names = ", ".join(alert.name for alert in others)
    return f"{first.words} The same kind of alert ({first.kind}) is up in {names}."
