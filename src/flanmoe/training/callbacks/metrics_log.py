"""`metrics.jsonl`: one row a step with its losses."""

from typing import Any, final

from flanmoe.core.rundir import RunDir
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.callbacks.rows_until import keep_rows_until
from flanmoe.training.report import StepReport

METRICS_FILE = "metrics.jsonl"


@final
class MetricsLog(StepCallback):
    """Writes the metrics of each step, with the real tokens trained on so far.

    Its state is the file: rows of steps that a resumed run makes again are taken out.
    """

    name = "metrics_log"

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._tokens = 0

    def start(self, step: int) -> None:
        """Cut the file back to the steps that count."""
        rows = keep_rows_until(self._run, METRICS_FILE, step=step)
        self._tokens = int(rows[-1]["tokens"]) if rows else 0

    def after_step(self, report: StepReport) -> None:
        """Write a row."""
        self._tokens += report.totals.real_tokens
        row: dict[str, Any] = {"step": report.step, "tokens": self._tokens, **report.metrics()}
        self._run.log(METRICS_FILE, row)
