"""Where the jobs of a study run: one seam, so that a process pool or a cluster can take its place.

The local executor gives every job a process of its own. That keeps the peak memory of one arm apart from
the other's, and keeps what libraries print away from our stdout.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flanmoe.core import files
from flanmoe.core.errors import FlanmoeError, Interrupted, UserError

ERROR_FILE = "error.json"
_STDERR = 2


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
        (job.folder / ERROR_FILE).unlink(missing_ok=True)
        command = [sys.executable, "-m", "flanmoe.study.worker", str(job.study_dir), job.arm]
        command += [str(job.seed), str(job.data_dir or "")]
        # A session of its own: the terminal's Ctrl-C reaches only us, and the worker gets exactly one. The
        # pipe tells the worker when we are gone, so that a killed study leaves no orphan writing on.
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=_STDERR, start_new_session=True
        ) as worker:
            status = _wait(worker)
        if status != 0:
            raise _failure(job, status)


def _wait(worker: "subprocess.Popen[bytes]") -> int:
    while True:
        try:
            return worker.wait()
        except KeyboardInterrupt:
            worker.send_signal(signal.SIGINT)


def _failure(job: Job, status: int) -> FlanmoeError:
    report = job.folder / ERROR_FILE
    if report.exists():
        content = files.read_json_file(report)
        kind = {2: UserError, 130: Interrupted}.get(content["exit_code"], FlanmoeError)
        return kind(content["message"])
    if status in (130, -signal.SIGINT):
        return Interrupted(
            f"Arm `{job.arm}` was stopped; `--resume` goes on from its last checkpoint."
        )
    cause = (
        f"signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exit status {status}"
    )
    return FlanmoeError(
        f"The process of arm `{job.arm}` (seed {job.seed}) ended with {cause} before it could say why. "
        f"If the system ran out of memory, lower `length`; then go on with `--resume --out {job.study_dir}`."
    )


def die_with_parent() -> None:
    """Interrupt this process when its stdin closes, which it does when the parent is gone."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGINT)
