"""One of two processes that train a tuner together, with the model whole and spread over both.

    python tuners_of_two.py ROWS.pickle STATISTICS FOLDER

`torchrun`'s environment is set by the test. Each process takes every second row. The first writes the weights
after merging to `KIND-SHARDING.pt`, and to `KIND-SHARDING-resumed.pt` those of a run that went on from a
checkpoint.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from flanmoe.testing.tiny_models import tiny_model
from flanmoe.testing.tuning import tune_rows


def main(rows_file: str, statistics: str, folder: str) -> None:
    """Train both tuners, with and without sharding."""
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = distributed.get_rank()
    rows = pickle.loads(Path(rows_file).read_bytes())[rank::2]
    tuners: dict[str, dict[str, Any]] = {
        "low_rank": {"rank": 2, "linear": {"targets": ["q_proj"], "router": True}},
        "expert_specialised": {"share": 0.3, "statistics": statistics},
    }
    for kind, settings in tuners.items():
        for sharding in ("none", "fsdp"):
            name = f"{kind}-{sharding}"
            # Nothing else but the number of steps differs from the run that is not stopped.
            for suffix, legs in (("", ((4, False),)), ("-resumed", ((2, False), (4, True)))):
                for steps, resume in legs:
                    model = tiny_model("mixtral")
                    tune_rows(
                        model,
                        rows,
                        Path(folder) / f"{name}{suffix}",
                        steps=steps,
                        resume=resume,
                        learning_rate=1e-2,
                        schedule="constant",
                        weight_decay=0.1,
                        checkpoint_every_steps=2,
                        sharding=sharding,
                        tuner={"kind": kind, **settings},
                    )
                if rank == 0:
                    weights = {key: value.detach() for key, value in model.named_parameters()}
                    torch.save(weights, Path(folder) / f"{name}{suffix}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
