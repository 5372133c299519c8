"""Two processes that take one step together; run as `python -m flanmoe.stages.doctor.ranks FOLDER TRAINER`.

They find each other through a file, so no port has to be free. Rank 0 writes `gradients.json`.
"""

import json
import multiprocessing
import os
import pkgutil
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from flanmoe.stages.doctor.one_step import one_step
from flanmoe.stages.doctor.trainers import MakeTrainer

WORLD_SIZE = 2
_MOST_WAITING = timedelta(seconds=30)


def trainer_named(name: str) -> MakeTrainer:
    """Return what makes a trainer by its `module:function`."""
    return pkgutil.resolve_name(name)


def take_step(rank: int, folder: Path, trainer: str) -> None:
    """Take part in one step on `WORLD_SIZE` rows, one on each process."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD_SIZE),
        "LOCAL_WORLD_SIZE": str(WORLD_SIZE),
    }
    dist.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=_MOST_WAITING,
    )
    found = one_step(trainer_named(trainer), rows=WORLD_SIZE, rows_per_batch=1, micro_batches=1)
    if rank == 0:
        (folder / "gradients.json").write_text(json.dumps(asdict(found)), encoding="utf-8")
    dist.destroy_process_group()


def main(folder: Path, trainer: str) -> int:
    """Be rank 0 and start rank 1; returns an exit status."""
    # A fork has imported everything already, which is most of the time that a process takes here. Other systems
    # than Linux do not let libraries fork safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    other = context.Process(target=take_step, args=(1, folder, trainer), daemon=True)
    other.start()
    take_step(0, folder, trainer)
    other.join()
    return other.exitcode or 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
