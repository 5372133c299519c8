"""`routing.jsonl`: what the routers did in each step, and expert use and drops over the whole run."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch

from flanmoe.core.rundir import RunDir
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.recorder import ExpertLoad
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.callbacks.rows_until import keep_rows_until
from flanmoe.training.drops import LayerDrops
from flanmoe.training.report import StepReport

ROUTING_FILE = "routing.jsonl"


@final
class RoutingLog(StepCallback):
    """Writes one row a step with the balance loss, the load and the drops of each sparse layer.

    Attributes:
        load: expert use of the run.
        drops: what found no expert in it, layer by layer.

    Args:
        run: where the file is written.
        blocks: the sparse blocks of the model, in layer order.
    """

    name = "routing_log"

    def __init__(self, run: RunDir, blocks: Sequence[MoEBlock]) -> None:
        self._run = run
        self._layers = [{"layer": block.layer, "name": block.name} for block in blocks]
        self._num_experts = [block.num_experts for block in blocks]
        self.load = ExpertLoad(self._num_experts)
        self.drops = [LayerDrops.none() for _ in blocks]

    def start(self, step: int) -> None:
        """Cut the file back to the steps that count."""
        keep_rows_until(self._run, ROUTING_FILE, step=step)

    def after_step(self, report: StepReport) -> None:
        """Write a row and add to the load of the run."""
        if report.router is None:
            return
        self.load.update(report.router.counts)
        drops = report.router.drops
        self.drops = [old + new for old, new in zip(self.drops, drops, strict=True)]
        of_step = ExpertLoad(self._num_experts)
        of_step.update(report.router.counts)
        layers = [
            {**layer, "balance": balance, **load, **dropped.to_mapping()}
            for layer, balance, load, dropped in zip(
                self._layers,
                report.router.balance_per_layer,
                of_step.to_mapping(),
                drops,
                strict=True,
            )
        ]
        self._run.log(ROUTING_FILE, {"step": report.step, "layers": layers})

    def state_dict(self) -> dict[str, Any]:
        """Return load and drops of the run so far."""
        return {
            **self.load.state_dict(),
            "drops": [layer.counts.tolist() for layer in self.drops],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from load and drops of an earlier part of the run."""
        self.load.load_state_dict(state)
        self.drops = [LayerDrops(torch.tensor(counts)) for counts in state["drops"]]
