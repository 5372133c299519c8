"""Where the stages of a study run: one seam behind which a process pool or a cluster stands.

What is handed over is a leg: stages that one process runs one after the other, so that a chain loads torch
once and hands its model on in memory. Every executor runs a leg in a process of its own, which keeps its peak
memory apart from the others' and what libraries print away from our stdout.
"""

import os
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flanmoe.core.cores import usable_cores
from flanmoe.core.errors import ConfigError
from flanmoe.study.child import Errand
from flanmoe.study.nodes import Branch

COSTS_FILE = "seconds.jsonl"
_THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True, slots=True)
class Leg:
    """Stages that one process runs, in order.

    Attributes:
        study_dir: folder of the study.
        stages: names of the stages' folders.
        models_needed: those of them whose model a later stage takes: they run again where it has been removed.
        data_dir: data folder, None where none was named.
        branch: the arm and seed that it runs for, first of all.
        memory_bytes: planned peak of its process.
        environment: variables that its process has beside ours; None takes one away.
    """

    study_dir: Path
    stages: tuple[str, ...]
    models_needed: tuple[str, ...]
    data_dir: Path | None
    branch: Branch
    memory_bytes: int
    environment: Mapping[str, str | None]


class Executor(Protocol):
    """Runs legs. A stage leaves its result in its folder, which every process of a study sees.

    Attributes:
        workers: how many legs run at a time, at most.
        remote: whether legs run where the memory is not this machine's.
    """

    @property
    def workers(self) -> int:
        """How many legs run at a time, at most."""
        ...

    @property
    def remote(self) -> bool:
        """Whether legs run where the memory is not this machine's."""
        ...

    def start(self, leg: Leg) -> "Future[None]":
        """Start a leg. It ends with its last stage, or before one that another process runs.

        The future raises what a stage raised, as a `FlanmoeError` with its exit status.
        """
        ...

    def interrupt(self) -> None:
        """Pass a Ctrl-C on to the legs that run; those that end by it raise `Interrupted`."""
        ...

    def close(self) -> None:
        """Let go of what was held for running legs; called once none runs any more."""
        ...


def errand(leg: Leg) -> Errand:
    """Return what a child process is sent to do for a leg."""
    values = {
        "study_dir": str(leg.study_dir),
        "stages": list(leg.stages),
        "models_needed": list(leg.models_needed),
        "data_dir": str(leg.data_dir) if leg.data_dir else None,
    }
    return Errand(
        "run_leg",
        values,
        name=leg.branch.name,
        way_out=(
            "If the system ran out of memory, lower `length`; then go on with "
            f"`--resume --out {leg.study_dir}`."
        ),
        traceback_file=leg.branch.folder(leg.study_dir) / "traceback.txt",
        environment=leg.environment,
    )


def threads_of(workers: int) -> dict[str, str | None]:
    """Return the variable that says how many threads a leg's process has: the same on every executor.

    With one worker as many as without us; several share the cores out.
    """
    given = os.environ.get(_THREADS_VARIABLE)
    if given is None and workers > 1:
        given = str(max(1, usable_cores() // workers))
    return {_THREADS_VARIABLE: given}


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
