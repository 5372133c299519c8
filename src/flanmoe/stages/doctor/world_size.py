"""Is the auxiliary loss multiplied by the number of data-parallel processes?

Two real processes (gloo, DDP) share the rows that one process takes in one batch. They are started first and
asked last: while they import what they need, the other checks run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from flanmoe.stages.doctor.check import Check, Measured, Probe
from flanmoe.stages.doctor.one_step import Gradients, one_step
from flanmoe.stages.doctor.ranks import WORLD_SIZE, trainer_named

PLAIN_TRAINER = "flanmoe.stages.doctor.trainers:plain_trainer"
_MOST_SECONDS = 50.0


@contextmanager
def begin(trainer: str = PLAIN_TRAINER) -> Generator[Probe]:
    """Start the processes; yields the function that waits for them and measures.

    They are gone when the `with` block is left, whatever happened.

    Args:
        trainer: `module:function` of what makes the trainer.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = _started(folder, trainer)
        deadline = time.monotonic() + _MOST_SECONDS
        try:
            yield lambda: _ratio(process, folder, trainer, deadline)
        finally:
            _end(process)


def _probe() -> Measured:
    with begin() as probe:
        return probe()


def _started(folder: Path, trainer: str) -> "subprocess.Popen[bytes]":
    # One thread each: their batches are of a few tokens.
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (folder / "printed.txt").open("wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-m", "flanmoe.stages.doctor.ranks", str(folder), trainer],
            env={**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            # Ctrl-C reaches this process, which ends them.
            start_new_session=True,
        )


def _ratio(
    process: "subprocess.Popen[bytes]", folder: Path, trainer: str, deadline: float
) -> Measured:
    alone = one_step(
        trainer_named(trainer), rows=WORLD_SIZE, rows_per_batch=WORLD_SIZE, micro_batches=1
    )
    try:
        status = process.wait(timeout=max(deadline - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        raise TimeoutError(
            f"{WORLD_SIZE} processes must take one step within {_MOST_SECONDS:.0f} seconds, but had not. Try "
            "again when the machine is less busy."
        ) from None
    if status != 0:
        raise RuntimeError(
            f"{WORLD_SIZE} processes (gloo) must take one step, but ended with status {status}: "
            f"{_last_line(folder / 'printed.txt')}"
        )
    together = Gradients(**json.loads((folder / "gradients.json").read_text(encoding="utf-8")))
    detail = f"The gradient of cross-entropy is {together.head / alone.head:.2f} times that of one process."
    return Measured(together.router / alone.router, detail)


def _last_line(printed: Path) -> str:
    lines = printed.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "nothing was printed"


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    process.wait()


CHECKS = (
    Check(
        name="world_size",
        library="transformers",
        measures=(
            f"Trainer: router gradient of the auxiliary loss, the same batch on {WORLD_SIZE} processes over one"
        ),
        expected=1.0,
        meaning=(
            "The auxiliary loss grows with the number of processes: with 8 GPUs a coefficient of 0.001 acts "
            "like 0.008, and accumulation multiplies that again. A recipe tuned on one GPU is another one on "
            "eight."
        ),
        way_out=(
            "Train with flanmoe (`flanmoe run`), whose router losses do not change with the number of "
            "processes. Otherwise divide `router_aux_loss_coef` by the number of processes."
        ),
        probe=_probe,
        begin=begin,
    ),
)
