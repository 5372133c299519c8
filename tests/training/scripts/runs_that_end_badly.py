"""Tuning runs that are killed, interrupted or run out of disk, each in a process of its own.

    python runs_that_end_badly.py CASES.json

imports everything once and forks for each case. What a case ended with goes to `outcome.json` beside its
run folder. The tests import this file too, for runs that end well.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flanmoe.core.errors import FlanmoeError
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.data.stream import PackedStream
from flanmoe.testing.tiny_models import tiny_model, tiny_tokenizer
from flanmoe.training import checkpoints, trainer
from flanmoe.training.arguments import TuneConfig
from flanmoe.training.callbacks.metrics_log import MetricsLog
from flanmoe.training.checkpoints import latest_checkpoint
from flanmoe.training.report import StepReport
from flanmoe.training.router_losses import RouterLossConfig
from flanmoe.training.tune import TuneResult, tune

_NEW_USER, _NEW_MOUNTS, _RECURSIVE, _PRIVATE = 0x10000000, 0x00020000, 0x4000, 0x40000


def run_case(case: dict[str, Any], *, folder: Path) -> tuple[PreTrainedModel, TuneResult]:
    """Tune a tiny model with dropout in `folder`; goes on if there is a complete checkpoint."""
    torch.set_num_threads(1)
    seeds = SeedTree(3)
    mixture = Mixture.load(
        MixtureConfig.parse({"tasks": [{"name": case["data"]}]}), seeds=seeds.child("data")
    )
    packing = PackingConfig(length=48, window=7)
    model = tiny_model(case["model"], attention_dropout=0.1)
    config = TuneConfig(
        steps=case["steps"],
        rows_per_step=4,
        micro_batch_rows=2,
        length=48,
        learning_rate=1e-3,
        precision=case.get("precision", "float32"),
        checkpoint_every_steps=case.get("checkpoint_every_steps", 2),
        router=RouterLossConfig(scope=case.get("scope", "global")),
        freeze=tuple(case.get("freeze", ())),
        expert_dropout=case.get("expert_dropout", 0.0),
    )
    result = tune(
        model,
        PackedStream(mixture, tiny_tokenizer(), packing, seeds.child("data")),
        config,
        run=RunDir(folder),
        seeds=seeds,
        flops_per_token=1.0,
        resume=latest_checkpoint(folder) is not None,
    )
    return model, result


def after_step(step: int, act: Callable[[], None]) -> None:
    """Have `act` called after a step, its metrics written, its checkpoint not yet."""
    original = MetricsLog.after_step

    def acting(log: MetricsLog, report: StepReport) -> None:
        original(log, report)
        if step in (report.step, 0):
            act()

    MetricsLog.after_step = acting


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_checkpoint(step: int) -> None:
    """Die when the model, the optimizer and our state are there, but the marker is not."""
    original = checkpoints.write_run_state

    def writing(folder: Path, state: checkpoints.RunState, *, process: int) -> None:
        original(folder, state, process=process)
        if folder.name.startswith(f"checkpoint-{step}."):
            kill()

    trainer.checkpoints.write_run_state = writing


def kill_before_removal(step: int) -> None:
    """Die when a new checkpoint counts, but the one before has not been removed."""

    def removing(folder: Path, *, keep: int) -> None:
        if (folder / f"checkpoint-{step}").exists():
            kill()

    trainer.checkpoints.remove_older = removing


def small_disk(folder: Path, kibibytes: int) -> None:
    """Give this process alone a folder on a tiny file system.

    Raises:
        PermissionError: where the system does not let it.
    """
    system = ctypes.CDLL(None, use_errno=True)
    folder.mkdir(parents=True)
    kind = _NEW_MOUNTS if os.geteuid() == 0 else _NEW_MOUNTS | _NEW_USER
    size = f"size={kibibytes}k".encode()
    if (
        system.unshare(kind)
        or system.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
        or system.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, size)
    ):
        raise PermissionError(ctypes.get_errno(), "a small disk cannot be mounted here")


def prepare(case: dict[str, Any], folder: Path) -> None:
    """Arrange for the bad end of a case."""
    step = case["at"]
    match case["end"]:
        case "kill":
            after_step(step, kill)
        case "kill_in_checkpoint":
            kill_in_checkpoint(step)
        case "kill_before_removal":
            kill_before_removal(step)
        case "interrupt":
            after_step(0, lambda: time.sleep(0.05))
        case "interrupt_twice":
            after_step(step, lambda: time.sleep(60))
        case "full_disk":
            small_disk(folder, case["kibibytes"])


def child(case: dict[str, Any], folder: Path) -> int:
    """Run a case to its end and write down what that was."""
    try:
        prepare(case, folder)
        run_case(case, folder=folder)
        outcome = {"type": "none", "text": "", "exit_code": 0}
    except FlanmoeError as error:
        outcome = {
            "type": type(error).__name__,
            "text": str(error),
            "exit_code": error.exit_code,
            "left": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        }
    except (KeyboardInterrupt, PermissionError) as error:
        outcome = {"type": type(error).__name__, "text": str(error), "exit_code": -1}
    (folder.parent / "outcome.json").write_text(json.dumps(outcome))
    return 0


def interrupt(process: int, metrics: Path, *, after: int, times: int) -> None:
    """Press Ctrl-C once so many steps have been made."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= after:
            break
        time.sleep(0.02)
    for _ in range(times):
        os.kill(process, signal.SIGINT)
        time.sleep(0.2)


def run_in_fork(case: dict[str, Any]) -> None:
    folder = Path(case["folder"])
    process = os.fork()
    if process == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = child(case, folder)
        os._exit(code)
    if case["end"].startswith("interrupt"):
        times = 2 if case["end"] == "interrupt_twice" else 1
        interrupt(process, folder / "metrics.jsonl", after=case["at"], times=times)
    start = time.monotonic()
    _, status = os.waitpid(process, 0)
    ending = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
    ending["seconds_to_end"] = round(time.monotonic() - start)
    (folder.parent / "ending.json").write_text(json.dumps(ending))


def main() -> None:
    gc.collect()
    gc.freeze()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_in_fork(case)


if __name__ == "__main__":
    main()
