"""Checkpoints that are either complete or do not count.

A checkpoint is written under a temporary name, flushed to disk, closed with a completion marker, and
only then renamed. A kill at any moment leaves the checkpoint before it in place, and older ones are
removed only after a newer one is complete. Its files are transformers' own (it loads with
`AutoModelForCausalLM`), and one of ours with the position in the data, the counts of the router
losses and what the callbacks have gathered.
"""

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from flanmoe.core import files
from flanmoe.core.config import Config
from flanmoe.core.errors import RunError

CHECKPOINTS_FOLDER = "checkpoints"
MARKER = "complete.json"
_RUN_STATE = "run_state.json"
_PARTIAL = ".partial"
_NEARLY_NOTHING = 2**16
_NAME = re.compile(r"checkpoint-(\d+)")


class RunState(Config):
    """What a run goes on from beside weights, optimizer, schedule and random state.

    Attributes:
        rows_trained: rows that this process has trained on.
        stream: position in the data.
        scope: state of the balance loss's scope.
        callbacks: state of each callback by its name.
    """

    rows_trained: int
    stream: dict[str, Any]
    scope: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]


def latest_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, None where there is none.

    Checkpoints that were not finished are removed.
    """
    folder = run_folder / CHECKPOINTS_FOLDER
    for path in _unfinished(folder):
        shutil.rmtree(path)
    complete = _complete(folder)
    return complete[-1] if complete else None


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps made at a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def remove_checkpoints(run_folder: Path) -> None:
    """Remove all checkpoints of a run, once its result has been saved elsewhere."""
    shutil.rmtree(run_folder / CHECKPOINTS_FOLDER, ignore_errors=True)


def remove_older(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints in a folder of checkpoints."""
    for path in _complete(folder)[:-keep]:
        # Without its marker first: a kill during removal leaves nothing that looks complete.
        (path / MARKER).unlink()
        shutil.rmtree(path)


@contextmanager
def writing(folder: Path, *, step: int, is_writer: bool = True) -> Generator[Path]:
    """Yield a new folder to write the checkpoint of a step into, and make it count afterwards.

    Args:
        folder: the folder of checkpoints.
        step: number of optimizer steps made.
        is_writer: False on processes that only add files of their own.

    Raises:
        DiskError: if the disk is full or the folder cannot be written; nothing is left behind.
    """
    final = folder / f"checkpoint-{step}"
    partial = folder / f"{final.name}{_PARTIAL}"
    with files.disk_errors(final), _no_progress_bars():
        partial.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if is_writer:
                _close(partial, step=step)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
                _flush(folder)
        except Exception as error:
            # torch.save speaks of an unexpected position when the disk is full, so we look.
            is_full = shutil.disk_usage(folder).free < _NEARLY_NOTHING
            shutil.rmtree(partial, ignore_errors=True)
            if is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


def write_run_state(checkpoint: Path, state: RunState) -> None:
    """Write our own file of a checkpoint."""
    files.write_json(checkpoint / _RUN_STATE, state.to_mapping())


def read_run_state(checkpoint: Path) -> RunState:
    """Read our own file of a checkpoint."""
    return RunState.parse(files.read_json_file(checkpoint / _RUN_STATE), origin=str(checkpoint))


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Overwrite the weights of a model with those of a checkpoint of it.

    Raises:
        RunError: if the checkpoint is of a model of another shape.
    """
    with _no_progress_bars():
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    own = model.state_dict()
    different = sorted(
        name
        for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )
    if different:
        raise RunError(
            f"The checkpoint {checkpoint} must hold the model that is to be trained, but "
            f"{len(different)} tensors differ, the first is {different[0]}. Start a new run."
        )
    model.load_state_dict(saved)


@contextmanager
def _no_progress_bars() -> Generator[None]:
    """Keep the bars of saving and loading from breaking up the one of training."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _close(partial: Path, *, step: int) -> None:
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in paths:
        _flush(path)
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in paths}
    files.write_json(partial / MARKER, {"step": step, "files": sizes})
    _flush(partial)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    found = [path for path in _checkpoints(folder) if (path / MARKER).is_file()]
    return sorted(found, key=checkpoint_step)


def _unfinished(folder: Path) -> list[Path]:
    torn = [path for path in _checkpoints(folder) if not (path / MARKER).is_file()]
    return torn + [path for path in folder.glob(f"checkpoint-*{_PARTIAL}") if path.is_dir()]


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
