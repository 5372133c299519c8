"""One of two processes that train an encoder-decoder together: `torchrun`'s environment is set by the test.

    python one_of_two_pairs.py MODEL ROUTERS.json ROWS.pickle OUT.pt

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
from transformers import AutoModelForSeq2SeqLM, TrainerCallback

import flanmoe.models  # noqa: F401 - makes FlanMoeT5 known to transformers
from flanmoe.core.seeds import SeedTree
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.rows import FixedRows
from flanmoe.training.trainer import SparseTrainer


class Keep(TrainerCallback):
    """Keeps gradients."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.gradients.append({name: value.grad.clone() for name, value in named})


def gradients_with(
    router: dict[str, Any], model_folder: Path, rows: list[Any], folder: Path
) -> list[dict[str, torch.Tensor]]:
    """Make two steps and return the gradients of each."""
    settings = {"steps": 2, "rows_per_step": 8, "micro_batch_rows": 2, "max_grad_norm": 0.0}
    config = TuneConfig.parse({**settings, "precision": "float32", "router": router})
    arguments = training_arguments(config, folder, SeedTree(0))
    assert arguments.world_size == 2
    keep = Keep()
    trainer = SparseTrainer(
        AutoModelForSeq2SeqLM.from_pretrained(model_folder).double(),
        arguments,
        stream=FixedRows(rows[arguments.process_index :: 2]),
        router=config.router,
    )
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradients


def main() -> None:
    """Run every setting, and save what the first process found."""
    model_folder, routers_file, rows_file, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    rows = pickle.loads(rows_file.read_bytes())
    found = [
        gradients_with(router, model_folder, rows, out.parent / "checkpoints")
        for router in json.loads(routers_file.read_text())
    ]
    if torch.distributed.get_rank() == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
