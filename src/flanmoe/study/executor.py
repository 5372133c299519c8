"""Where the jobs of a study run: one seam, so that a process pool or a cluster can take its place.

The local executor gives every job a process of its own. That keeps the peak memory of one arm apart from
the other's, and keeps what libraries print away from our stdout.
"""

import os
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flanmoe.core.console import say
from flanmoe.core.errors import ConfigError, DiskError
from flanmoe.core.memory import peak_memory_bytes, peak_memory_of_children_bytes
from flanmoe.core.rundir import RunDir
from flanmoe.study.child import Errand, ask

RESULT_FILE = "result.json"
COSTS_FILE = "seconds.jsonl"


@dataclass(frozen=True, slots=True)
class Job:
    """One arm with one seed.

    Attributes:
        study_dir: folder of the study; its `recipe.yaml` says what to do.
        arm: name of the arm.
        seed: the seed.
        data_dir: data folder, None where none was named.
    """

    study_dir: Path
    arm: str
    seed: int
    data_dir: Path | None

    @property
    def folder(self) -> Path:
        """The folder that this job writes."""
        return self.study_dir / "arms" / self.arm / f"seed-{self.seed}"


class Executor(Protocol):
    """Runs jobs. A job leaves its results in its folder; failures are raised."""

    def run(self, job: Job) -> None:
        """Run one job to its end.

        Raises:
            FlanmoeError: what the job raised, with its exit status.
        """
        ...


class LocalExecutor:
    """One child process a job, one after the other."""

    def run(self, job: Job) -> None:
        """Start the worker, pass Ctrl-C on to it once, and raise what it raised."""
        values = {
            "study_dir": str(job.study_dir),
            "arm": job.arm,
            "seed": job.seed,
            "data_dir": str(job.data_dir) if job.data_dir else None,
        }
        ask(
            Errand(
                "run_job",
                values,
                name=f"Arm `{job.arm}` (seed {job.seed})",
                way_out=(
                    "If the system ran out of memory, lower `length`; then go on with "
                    f"`--resume --out {job.study_dir}`."
                ),
                traceback_file=job.folder / "traceback.txt",
            )
        )


def require_one_process() -> None:
    """Refuse to run a study where torchrun started several processes.

    Every one of them would run the whole study into the same folder, on the same rows.

    Raises:
        ConfigError: says how many there are.
    """
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found > 1:
        raise ConfigError(
            f"A study runs in 1 process, but torchrun started {found}. Run it without torchrun, or "
            "tune in several processes from Python (`docs/guide/distributed.md`)."
        )


def run_jobs(run: RunDir, jobs: Sequence[Job], executor: Executor) -> None:
    """Run the jobs that are not finished yet, and note in the study's folder what that took.

    Raises:
        FlanmoeError: what a job raised; finished jobs are kept.
    """
    with _costs_noted(run):
        for job in jobs:
            if RunDir(job.folder).has(RESULT_FILE):
                say(f"Arm {job.arm}, seed {job.seed}: finished before.")
                continue
            say(f"Arm {job.arm}, seed {job.seed}")
            executor.run(job)


@contextmanager
def _costs_noted(run: RunDir) -> Generator[None]:
    start = time.monotonic()

    def note() -> None:
        row = {
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_memory_of_children_bytes": peak_memory_of_children_bytes(),
        }
        run.log(COSTS_FILE, row)

    try:
        yield
    except BaseException:
        # What stopped the jobs is what the user must hear, not that a full disk cannot take this too.
        with suppress(DiskError):
            note()
        raise
    note()
