"""`routing.jsonl`: what the routers did in each step, and their sums over the whole run."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from flanmoe.core.rundir import RunDir
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing_measures import measures_of_layers
from flanmoe.moe.routing_sums import RoutingSums, added_layers
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.callbacks.routing_alerts import RoutingAlerts
from flanmoe.training.callbacks.rows_until import keep_rows_until
from flanmoe.training.report import RouterReport, StepReport
from flanmoe.training.routing_monitor import DEFAULT_MONITOR, RoutingMonitorConfig

ROUTING_FILE = "routing.jsonl"

# What is told of each task in each step, one number a layer. The rest is told of the whole run.
_OF_TASKS = (
    "entropy_share",
    "max_over_mean",
    "router_entropy_share",
    "confidence",
    "dropped_share",
    "unserved_share",
)


@final
class RoutingLog(StepCallback):
    """Writes one row a step: the measures of each sparse layer, of tasks, and the alerts that are up.

    Attributes:
        task_names: the tasks, in the order of their numbers.
        sums: what the routers did in the whole run, layer by layer, a group for each task.

    Args:
        run: where the file is written.
        blocks: the sparse blocks of the model, in layer order.
        task_names: the tasks.
        alerts: where the alerts come from.
        config: what is recorded.
    """

    name = "routing_log"

    def __init__(
        self,
        run: RunDir,
        blocks: Sequence[MoEBlock],
        *,
        task_names: Sequence[str],
        alerts: RoutingAlerts,
        config: RoutingMonitorConfig = DEFAULT_MONITOR,
    ) -> None:
        self._run = run
        self._layers = [{"layer": block.layer, "name": block.name} for block in blocks]
        self.task_names = tuple(task_names)
        self._alerts = alerts
        self.sums = [
            RoutingSums.none(len(task_names), block.num_experts, coactivation=config.coactivation)
            for block in blocks
        ]

    def start(self, step: int) -> None:
        """Cut the file back to the steps that count."""
        keep_rows_until(self._run, ROUTING_FILE, step=step)

    def after_step(self, report: StepReport) -> None:
        """Write a row and add to the sums of the run."""
        router = report.router
        if router is None or not router.routing:
            return
        self.sums = added_layers(self.sums, router.routing)
        row = {
            "step": report.step,
            "layers": self._rows(router),
            "worst": router.worst,
            "mean": router.mean,
            "tasks": self._tasks(router.routing),
            "alerts": [
                alert.model_dump(include={"kind", "name", "experts", "value", "limit"}, mode="json")
                for alert in self._alerts.up
            ],
        }
        self._run.log(ROUTING_FILE, row)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the run so far."""
        return {"sums": [layer.state_dict() for layer in self.sums]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the sums of an earlier part of the run."""
        self.sums = [RoutingSums.from_state(layer) for layer in state["sums"]]

    def _rows(self, router: RouterReport) -> list[dict[str, Any]]:
        return [
            {**layer, "balance": balance, **measured.to_mapping()}
            for layer, balance, measured in zip(
                self._layers, router.balance_per_layer, router.measures, strict=True
            )
        ]

    def _tasks(self, routing: Sequence[RoutingSums]) -> dict[str, dict[str, list[float]]]:
        """Measures of the tasks that the step had tokens of, a number for each layer."""
        there = torch.stack([layer.tokens for layer in routing]).sum(dim=0).nonzero()[:, 0]
        layers = measures_of_layers([layer.of_groups(there) for layer in routing])
        return {
            self.task_names[number]: {
                "tokens": [layer[place].tokens for layer in layers],
                **{name: [getattr(layer[place], name) for layer in layers] for name in _OF_TASKS},
            }
            for place, number in enumerate(there.tolist())
        }
