"""Training in two processes, sharded and not, run after run in the same two.

    python sharded_runs.py FOLDER

`torchrun`'s environment is set by the test. Reads `rows` (pickled) and `data.jsonl` in FOLDER, the each
process writes what it found to `out-RANK.pt`.
"""

import gc
import pickle
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from flanmoe.core.errors import FlanmoeError, RunError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Packed
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.data.stream import PackedStream
from flanmoe.models.freezing import freeze
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer
from flanmoe.training.arguments import TuneConfig, training_arguments
from flanmoe.training.checkpoints import MARKER, load_sharded_weights
from flanmoe.training.rows import FixedRows
from flanmoe.training.sharding import sharded_copy, whole
from flanmoe.training.trainer import SparseTrainer
from flanmoe.training.tune import tune

ROUTER = {"balance_coefficient": 0.5, "z_coefficient": 0.1}
# In float64, two micro-batches a process: the gradients of two steps.
GRADIENTS: dict[str, dict[str, Any]] = {
    "global": {"router": {**ROUTER, "scope": "global"}},
    "lagged": {"router": {**ROUTER, "scope": "lagged"}},
    "tied": {"model": "granitemoe", "router": {**ROUTER, "scope": "global"}},
    "recomputed": {"gradient_checkpointing": True, "router": {**ROUTER, "scope": "lagged"}},
}
# In float32, one micro-batch a process: the weights after four steps, sharded and not.
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    "recomputed": {"precision": "bfloat16", "gradient_checkpointing": True},
    "frozen gate": {"precision": "float32", "freeze": ("gate",)},
    "frozen rest": {
        "precision": "bfloat16",
        "freeze": ("non_moe",),
        "gradient_checkpointing": True,
    },
    "clipped": {"precision": "float32", "max_grad_norm": 0.1},
}
# Six steps with dropout, and the last three of them once more.
RESUMED: dict[str, dict[str, Any]] = {
    "fsdp": {"sharding": "fsdp", "router": {**ROUTER, "scope": "lagged"}},
    "fsdp global": {"sharding": "fsdp", "router": {**ROUTER, "scope": "global"}},
    "none": {"sharding": "none", "router": {**ROUTER, "scope": "lagged"}},
}


class Keep(TrainerCallback):
    """Keeps the gradients of each step, and how much of each weight lies in this process."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.shares: dict[str, float] = {}
        self.early_shares: set[float] = set()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for value in kwargs["model"].parameters():
            held = value.grad.to_local() if isinstance(value.grad, DTensor) else value.grad
            self.early_shares.add(0.0 if held is None else held.numel() / value.numel())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = [(name, value) for name, value in kwargs["model"].named_parameters()]
        self.gradients.append(
            {name: whole(value.grad).clone() for name, value in named if value.grad is not None}
        )
        self.shares = {
            name: value.to_local().numel() / value.numel()
            for name, value in named
            if isinstance(value, DTensor)
        }


def run(
    model: PreTrainedModel, rows: Sequence[Packed], folder: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train and return gradients, shares, gradient norms and the weights that came back."""
    values = {"rows_per_step": 8, "micro_batch_rows": 2, "max_grad_norm": 0.0, **settings}
    config = TuneConfig.parse(values)
    arguments = training_arguments(config, folder / "unused", SeedTree(0))
    trainer = SparseTrainer(
        model,
        arguments,
        stream=FixedRows(rows[arguments.process_index :: 2]),
        router=config.router,
        sharding=config.sharding,
    )
    keep = Keep()
    trainer.add_callback(keep)
    with closing(trainer):
        trainer.train()
    return {
        "gradients": keep.gradients,
        "shares": keep.shares,
        "early shares": keep.early_shares,
        "norms": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
        "weights": model.state_dict(),
    }


def gradients(rows: Sequence[Packed], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, case in GRADIENTS.items():
        settings = {"steps": 2, "precision": "float32", "sharding": "fsdp", **case}
        model = tiny_model(settings.pop("model", "mixtral")).double()
        found[name] = run(model, rows, folder, settings)
    return found


def weights(rows: Sequence[Packed], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, case in WEIGHTS.items():
        settings = {"steps": 4, "micro_batch_rows": 4, "learning_rate": 1e-3, **case}
        presets = settings.pop("freeze", ())
        for sharding in ("fsdp", "none"):
            model = tiny_model("mixtral")
            freeze(model, presets)
            settings["sharding"] = sharding
            found[f"{name}, {sharding}"] = run(model, rows, folder, settings)
    return found


def tuned(folder: Path, data: Path, settings: dict[str, Any], *, resume: bool) -> PreTrainedModel:
    """Tune with everything that a checkpoint has to hold: packed data, dropout, a schedule."""
    seeds = SeedTree(3)
    mixture = Mixture.load(
        MixtureConfig.parse({"tasks": [{"name": str(data)}]}), seeds=seeds.child("data")
    )
    model = tiny_model("mixtral", attention_dropout=0.1)
    config = TuneConfig.parse(
        {
            "steps": 6,
            "rows_per_step": 4,
            "length": 48,
            "learning_rate": 1e-3,
            "checkpoint_every_steps": 3,
            "keep_checkpoints": 2,
            **settings,
        }
    )
    stream = PackedStream(
        mixture,
        tiny_tokenizer(),
        PackingConfig(length=48, window=7),
        seeds.child("data"),
        rank=torch.distributed.get_rank(),
        world_size=2,
    )
    tune(
        model,
        stream,
        config,
        run=RunDir(folder),
        seeds=seeds,
        flops_per_token=1.0,
        resume=resume,
    )
    return model


def resumed(data: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    ids = torch.arange(3, 40).reshape(1, -1)
    for name, settings in RESUMED.items():
        path = folder / name
        whole_run = tuned(path, data, settings, resume=False)
        rows = RunDir(path).rows("metrics.jsonl")
        with torch.no_grad():
            logits = whole_run(input_ids=ids).logits
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            # The last checkpoint becomes one that was not finished; both processes find it.
            (path / "checkpoints" / "checkpoint-6").rename(path / "finished")
            (path / "checkpoints" / "checkpoint-6").mkdir()
        torch.distributed.barrier()
        again = tuned(path, data, settings, resume=True)
        restored = tuned(path, data, settings, resume=True)
        found[name] = {
            "whole": whole_run.state_dict(),
            "resumed": again.state_dict(),
            "restored": restored.state_dict(),
            "rows": rows,
            "rows again": RunDir(path).rows("metrics.jsonl"),
            "ids": ids,
            "logits": logits,
        }
    return found


def refusals(folder: Path) -> dict[str, str]:
    """Return the sentences of what cannot be resumed."""
    found: dict[str, str] = {}
    other = sharded_copy(tiny_model("mixtral", num_local_experts=4), torch.device("cpu"))
    checkpoint = folder / "fsdp" / "finished"
    assert (checkpoint / MARKER).exists()
    try:
        load_sharded_weights(other, checkpoint, kind=type(tiny_model("mixtral")))
    except RunError as error:
        found["other shape"] = str(error)
    try:
        tuned(folder / "fsdp", folder / "data.jsonl", {"sharding": "none"}, resume=True)
    except RunError as error:
        found["other sharding"] = str(error)
    return found


def failure(rows: Sequence[Packed], folder: Path) -> dict[str, Any]:
    """Return what is left of a model after a run that broke off."""
    model = tiny_model("mixtral")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    try:
        run(model, rows, folder, {"steps": 2, "sharding": "fsdp"})
    except FlanmoeError as error:
        return {"text": str(error), "left": sum(value.numel() for value in model.parameters())}
    return {}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    # Every trainer collects garbage twice, through all modules that were ever imported.
    gc.collect()
    gc.freeze()
    rows = pickle.loads((folder / "rows").read_bytes())
    out = {
        "gradients": gradients(rows, folder),
        "weights": weights(rows, folder),
        "resumed": resumed(folder / "data.jsonl", folder),
        "refusals": refusals(folder),
        "failure": failure(rows, folder),
    }
    torch.save(out, folder / f"out-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
