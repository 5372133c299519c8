"""The progress bar of a tuning run: steps, rate and time left, loss, tokens per second."""

import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, final

from flanmoe.core.console import Advance, progress
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.report import StepReport


@final
class ProgressDisplay(StepCallback):
    """Moves a progress bar on with every step; holds no state.

    Args:
        advance: what `flanmoe.core.console.progress` yields.
    """

    name = "progress"

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
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
        self._advance(1, note=f"loss {loss}, {rate:.0f} tokens/s")


def _show_nothing(*arguments: Any, **options: Any) -> None:
    pass


@contextmanager
def shown_progress(title: str, *, steps: int, is_shown: bool = True) -> Generator[ProgressDisplay]:
    """Show a progress bar of `steps` steps while the block runs.

    Args:
        title: what is being done.
        steps: optimizer steps ahead.
        is_shown: False in all but one process of a run.
    """
    if not is_shown:
        yield ProgressDisplay(_show_nothing)
        return
    with progress(title, total=steps, unit="steps") as advance:
        yield ProgressDisplay(advance)
