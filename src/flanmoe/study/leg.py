"""A leg in its own process: stages one after the other, each under its lock, the model handed on in memory.

The lock of a stage is held by the process that runs it and goes with that process, however it ends. So two
processes never run one stage, and a stage that was killed can be gone on with at once.
"""

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flanmoe.core.files import disk_errors
from flanmoe.study.nodes import FAILURE_FILE, STAGES_FOLDER, is_finished

_LOCK_FILE = "lock"
# Imported by name once the first stage is ours: it loads torch, which takes seconds.
_RUNNER = "flanmoe.study.runner"


class StageIsTakenError(Exception):
    """Another process holds the lock of a stage."""


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the lock of the stage in a folder.

    Raises:
        StageIsTakenError: if another process holds it.
        DiskError: if the disk is full or the folder cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StageIsTakenError from error
    try:
        yield
    finally:
        lock.release()


def is_taken(folder: Path) -> bool:
    """Say whether a process holds the lock of the stage in a folder."""
    try:
        with locked(folder):
            return False
    except StageIsTakenError:
        return True


def run_leg(
    *, study_dir: str, stages: list[str], models_needed: list[str], data_dir: str | None
) -> None:
    """Run the stages of a leg; ends early before a stage that another process runs.

    Args:
        study_dir: folder of the study.
        stages: names of the stages' folders, in order.
        models_needed: see `executor.Leg`.
        data_dir: data folder, None where none was named.

    Raises:
        FlanmoeError: what a stage raised; those before it are kept.
    """
    held: Any = None
    for name in stages:
        folder = Path(study_dir) / STAGES_FOLDER / name
        try:
            with locked(folder):
                # Under the lock: who had it before may have finished the stage.
                if is_finished(folder, model_needed=name in models_needed):
                    continue
                held = _run(folder, held, data_dir)
        except StageIsTakenError:
            return


def _run(folder: Path, held: Any, data_dir: str | None) -> Any:
    (folder / FAILURE_FILE).unlink(missing_ok=True)
    runner = importlib.import_module(_RUNNER)
    return runner.run_stage(folder, held, Path(data_dir) if data_dir else None)
