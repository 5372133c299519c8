"""One of two processes that train together: `torchrun`'s environment is set by the test.

    python one_of_two.py SCOPE ROWS.pickle OUT.pt

Takes every second row, makes two steps, writes the gradients of each (first process only).
"""

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
    """Keeps gradients and reports."""

    name = "keep"

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({name: value.grad.clone() for name, value in named})

    def after_step(self, report: StepReport) -> None:
        self.metrics.append(report.metrics())


def main() -> None:
    scope, rows_file, out = sys.argv[1:]
    torch.set_num_threads(1)
    config = TuneConfig.parse(
        {
            "steps": 2,
            "rows_per_step": 8,
            "micro_batch_rows": 2,
            "precision": "float32",
            "max_grad_norm": 0.0,
            "router": {"balance_coefficient": 0.5, "z_coefficient": 0.1, "scope": scope},
        }
    )
    arguments = training_arguments(config, Path(out).parent / "checkpoints", SeedTree(0))
    assert arguments.world_size == 2
    assert arguments.gradient_accumulation_steps == 2
    rows = pickle.loads(Path(rows_file).read_bytes())
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
    if arguments.process_index == 0:
        torch.save({"gradients": keep.gradients, "metrics": keep.metrics}, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
