"""Checkpoints that are either complete or do not count.

A checkpoint is written under a temporary name, flushed to disk, closed with a completion marker, and
only then renamed. A kill at any moment leaves the checkpoint before it in place, and older ones are
removed only after a newer one is complete. Its files are transformers' own (it loads with
`AutoModelForCausalLM`, sharded or not), and for each process one of ours with the position in the
data, the counts of the router losses and what the callbacks have gathered. The optimizer state of a
sharded model is a folder to which each process adds what it holds.
"""

import errno
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from flanmoe.core import files
from flanmoe.core.config import Config
from flanmoe.core.errors import RunError
from flanmoe.training.sharding import Sharding, set_full_weights

CHECKPOINTS_FOLDER = "checkpoints"
MARKER = "complete.json"
_RUN_STATE = "run_state.json"
_OPTIMIZER_SHARDS = "optimizer"
_PARTIAL = ".partial"
_NEARLY_NOTHING = 2**16
_NAME = re.compile(r"checkpoint-(\d+)")


class Layout(Config):
    """How a run lies on processes.

    Attributes:
        num_processes: number of processes.
        sharding: what is spread over them.
    """

    num_processes: int = 1
    sharding: Sharding = "none"

    def __str__(self) -> str:
        plural = "es" if self.num_processes > 1 else ""
        return f"{self.num_processes} process{plural} with `sharding: {self.sharding}`"


class RunState(Config):
    """What one process goes on from beside weights, optimizer, schedule and random state.

    Attributes:
        rows_trained: rows that this process has trained on.
        stream: position in the data.
        scope: state of the balance loss's scope.
        callbacks: state of each callback by its name.
        layout: the processes of the run.
    """

    rows_trained: int
    stream: dict[str, Any]
    scope: dict[str, Any]
    callbacks: dict[str, dict[str, Any]]
    layout: Layout = Layout()


def latest_checkpoint(run_folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, None where there is none.

    Checkpoints that were not finished are removed.
    """
    folder = run_folder / CHECKPOINTS_FOLDER
    for path in _unfinished(folder):
        # Every process of a run looks, and may find the others removing it already.
        with suppress(FileNotFoundError):
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
                files.flush(folder)
        except Exception as error:
            # torch.save speaks of an unexpected position when the disk is full, so we look.
            is_full = shutil.disk_usage(folder).free < _NEARLY_NOTHING
            shutil.rmtree(partial, ignore_errors=True)
            if is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


def write_run_state(checkpoint: Path, state: RunState, *, process: int = 0) -> None:
    """Write our own file of a checkpoint, that of one process."""
    files.write_json(_run_state_file(checkpoint, process), state.to_mapping())


def read_run_state(checkpoint: Path, *, layout: Layout | None = None, process: int = 0) -> RunState:
    """Read our own file of a checkpoint, that of one process.

    Args:
        checkpoint: folder of the checkpoint.
        layout: the processes that go on from it; one that shards nothing by default.
        process: number of this process.

    Raises:
        RunError: if other processes wrote the checkpoint.
    """
    first = _read_run_state(_run_state_file(checkpoint, 0))
    layout = layout or Layout()
    if first.layout != layout:
        raise RunError(
            f"The checkpoint {checkpoint} was written by {first.layout}, but resumed by {layout}. "
            "Resume as the run was started."
        )
    return _read_run_state(_run_state_file(checkpoint, process)) if process else first


def _run_state_file(checkpoint: Path, process: int) -> Path:
    return checkpoint / (f"run_state_{process}.json" if process else _RUN_STATE)


def _read_run_state(file: Path) -> RunState:
    return RunState.parse(files.read_json_file(file), origin=str(file))


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Overwrite the weights of a model with those of a checkpoint of it.

    Raises:
        RunError: if the checkpoint is of a model of another shape.
    """
    saved = _saved_weights(checkpoint, kind=type(model), dtype=model.dtype)
    _require_same(checkpoint, _different(model, saved))
    model.load_state_dict(saved)


def load_sharded_weights(
    sharded: PreTrainedModel, checkpoint: Path, *, kind: type[PreTrainedModel]
) -> None:
    """Overwrite the weights of a sharded model; every process must call it.

    The first process reads the checkpoint and hands the others their parts.

    Args:
        sharded: what `sharded_copy` returned.
        checkpoint: folder of the checkpoint.
        kind: the class of the model that was sharded.

    Raises:
        RunError: if the checkpoint is of a model of another shape; in every process.
    """
    saved: dict[str, Tensor] = {}
    different: list[list[str]] = [[]]
    if distributed.get_rank() == 0:
        saved = _saved_weights(checkpoint, kind=kind, dtype=sharded.dtype)
        different = [_different(sharded, saved)]
    distributed.broadcast_object_list(different)
    _require_same(checkpoint, different[0])
    set_full_weights(sharded, saved)


def save_sharded_optimizer(
    sharded: PreTrainedModel, optimizer: Optimizer, checkpoint: Path
) -> None:
    """Write what each process holds of the optimizer state; every process must call it."""
    state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(sharded, optimizer)}
    save_shards(state, checkpoint_id=checkpoint / _OPTIMIZER_SHARDS)


def load_sharded_optimizer(
    sharded: PreTrainedModel, optimizer: Optimizer, checkpoint: Path
) -> None:
    """Take over what `save_sharded_optimizer` wrote; every process must call it."""
    state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(sharded, optimizer)}
    load_shards(state, checkpoint_id=checkpoint / _OPTIMIZER_SHARDS)
    set_optimizer_state_dict(sharded, optimizer, state["optimizer"])


def _saved_weights(
    checkpoint: Path, *, kind: type[PreTrainedModel], dtype: torch.dtype
) -> dict[str, Tensor]:
    with _no_progress_bars():
        return kind.from_pretrained(checkpoint, dtype=dtype).state_dict()


def _different(model: PreTrainedModel, saved: Mapping[str, Tensor]) -> list[str]:
    """Return the names that only one of the two has, or that have another shape."""
    own = model.state_dict()
    return sorted(
        name
        for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )


def _require_same(checkpoint: Path, different: list[str]) -> None:
    if different:
        raise RunError(
            f"The checkpoint {checkpoint} must hold the model that is to be trained, but "
            f"{len(different)} tensors differ, the first is {different[0]}. Start a new run."
        )


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
        files.flush(path)
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in paths}
    files.write_json(partial / MARKER, {"step": step, "files": sizes})
    files.flush(partial)


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
