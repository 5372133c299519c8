"""One of two processes that train together: `torchrun`'s environment is set by the test.

    python one_of_two.py ROUTERS.json ROWS.pickle OUT.pt

For each of the router settings: takes every second row, makes two steps from the same weights, and writes
the gradients of each (first process only).
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback

from flanmoe.core.seeds import SeedTree
from flanmoe.testing.tiny_models import tiny_model
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.callbacks.base import StepCallback
from flanmoe.training.report import StepReport
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer


class Keep(TrainerCallback, StepCallback):
    """Keeps gradients."""

    name = "keep"

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({name: value.grad.clone() for name, value in named})

    def after_step(self, report: StepReport) -> None:
        """Leave reports alone."""


def gradients_with(
    router: dict[str, Any], rows: list[Any], folder: Path
) -> list[dict[str, torch.Tensor]]:
    """Make two steps and return the gradients of each."""
    config = TuneConfig.parse(
        {
            "steps": 2,
            "rows_per_step": 8,
            "micro_batch_rows": 2,
            "precision": "float32",
            "max_grad_norm": 0.0,
            "router": router,
        }
    )
    arguments = training_arguments(config, folder, SeedTree(0))
    assert arguments.world_size == 2
    assert arguments.gradient_accumulation_steps == 2
    keep = Keep()
    trainer = SparseTrainer(
        tiny_model("mixtral").double(),
        arguments,
        stream=FixedRows(rows[arguments.process_index :: 2]),
        router=config.router,
        callbacks=[keep],
    )
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradients


def main() -> None:
    """Run every setting, and save what the first process found."""
    routers_file, rows_file, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    rows = pickle.loads(rows_file.read_bytes())
    found = [
        gradients_with(router, rows, out.parent / "checkpoints")
        for router in json.loads(routers_file.read_text())
    ]
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
