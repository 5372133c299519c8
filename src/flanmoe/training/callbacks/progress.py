"""The progress bar of a tuning run: steps, rate and time left, loss, tokens per second, the worst layer."""

import math
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, final

from flanmoe.core.console import Advance, progress
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.callbacks.routing_alerts import RoutingAlerts
from flanmoe.training.report import RouterReport, StepReport


@final
class ProgressDisplay(StepCallback):
    """Moves a progress bar on with every step; holds no state.

    Args:
        advance: what `flanmoe.core.console.progress` yields.
        layers: what the sparse layers are called, in order.
        alerts: where alerts come from; None for a dense model.
    """

    name = "progress"

    def __init__(
        self, advance: Advance, *, layers: Sequence[str] = (), alerts: RoutingAlerts | None = None
    ) -> None:
        self._advance = advance
        self._layers = tuple(layers)
        self._alerts = alerts
        self._last = time.monotonic()

    def start(self, step: int) -> None:
        """Measure the first step from here."""
        self._last = time.monotonic()

    def after_step(self, report: StepReport) -> None:
        """Advance by one step."""
        now = time.monotonic()
        rate = report.totals.real_tokens / max(now - self._last, 1e-9)
        self._last = now
        loss = f"{report.cross_entropy:.3f}" if math.isfinite(report.cross_entropy) else "?"
        note = f"loss {loss}, {rate:.0f} tokens/s"
        if report.router is not None and report.router.measures:
            note = f"{note}; {self._worst_layer(report.router)}"
        self._advance(1, note=note)

    def _worst_layer(self, router: RouterReport) -> str:
        """Say how uneven the layer of the busiest expert is, and how many alerts are up."""
        place, worst = max(
            enumerate(router.measures), key=lambda numbered: numbered[1].max_over_mean
        )
        number = len(self._alerts.up) if self._alerts else 0
        alerts = f", {number} alert{'s' if number > 1 else ''}" if number else ""
        return (
            f"worst layer {self._layers[place]}: busiest x{worst.max_over_mean:.1f}, "
            f"entropy {100 * worst.entropy_share:.0f} %{alerts}"
        )


def _show_nothing(*arguments: Any, **options: Any) -> None:
    pass


@contextmanager
def shown_progress(
    title: str,
    *,
    steps: int,
    is_shown: bool = True,
    layers: Sequence[str] = (),
    alerts: RoutingAlerts | None = None,
) -> Generator[ProgressDisplay]:
    """Show a progress bar of `steps` steps while the block runs.

    Args:
        title: what is being done.
        steps: optimizer steps ahead.
        is_shown: False in all but one process of a run.
        layers, alerts: as in `ProgressDisplay`.
    """
    if not is_shown:
        yield ProgressDisplay(_show_nothing, layers=layers, alerts=alerts)
        return
    with progress(title, total=steps, unit="steps") as advance:
        yield ProgressDisplay(advance, layers=layers, alerts=alerts)
