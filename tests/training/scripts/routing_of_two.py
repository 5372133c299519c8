"""One of two processes that train together: what both say of the routing.

    python routing_of_two.py ROWS.pickle FOLDER

`torchrun`'s environment is set by the test. Each process takes every second row, makes one step, and writes
the sums that it was told to `sums-RANK.json`, with how often processes had to wait for each other.
"""

import json
import pickle
import sys
from pathlib import Path

import torch
import torch.distributed

from flanmoe.core.errors import DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.report import StepReport
from flanmoe.training.routing_monitor import require_same_tasks
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer

TASKS = ("arithmetic", "boolean", "cloze")


class Keep(StepCallback):
    """Keeps the sums of the step."""

    name = "keep"

    def __init__(self) -> None:
        self.sums: list[dict[str, list]] = []

    def after_step(self, report: StepReport) -> None:
        """Keep them."""
        assert report.router is not None
        self.sums = [layer.state_dict() for layer in report.router.routing]


class Counting(SparseTrainer):
    """Counts reductions over processes."""

    reductions = 0

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        self.reductions += 1
        return super()._summed(values)


def main() -> None:
    """Make a step, then be refused for streams that name different tasks."""
    rows_file, folder = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    rows = pickle.loads(rows_file.read_bytes())
    config = TuneConfig.parse(
        {
            "steps": 1,
            "rows_per_step": 8,
            "micro_batch_rows": 2,
            "precision": "float32",
            "routing": {"coactivation": True},
        }
    )
    arguments = training_arguments(config, folder / "checkpoints", SeedTree(0))
    rank = arguments.process_index
    keep = Keep()
    trainer = Counting(
        tiny_model("mixtral").double(),
        arguments,
        stream=FixedRows(rows[rank::2], task_names=TASKS),
        router=config.router,
        routing=config.routing,
        callbacks=[keep],
    )
    trainer.train()
    refused = ""
    try:
        require_same_tasks(TASKS[: rank + 1])
    except DataError as error:
        refused = str(error)
    told = {"sums": keep.sums, "reductions": trainer.reductions, "refused": refused}
    (folder / f"sums-{rank}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
