"""Two real processes: the installed trainer, a right one, one that breaks, one that hangs."""

import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from flanmoe.stages.doctor import world_size
from flanmoe.stages.doctor.check import Finding, run_check
from flanmoe.stages.doctor.ranks import WORLD_SIZE

pytestmark = pytest.mark.slow

PLANTED = """
import os, time
from transformers import Trainer
from flanmoe.stages.doctor import trainers

class Divided(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss - outputs.aux_loss) * self.accelerator.num_processes + outputs.aux_loss

class Multiplied(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return outputs.loss * self.accelerator.num_processes

def as_class(kind, job):
    trainer = trainers.plain_trainer(job)
    trainer.__class__ = kind
    return trainer

def divided(job):
    return as_class(Divided, job)

def multiplied(job):
    return as_class(Multiplied, job)

def breaking(job):
    if os.environ.get("RANK") == "0":
        raise ValueError("this trainer breaks")
    return divided(job)

def hanging(job):
    if "RANK" in os.environ:
        time.sleep(600)
    return divided(job)
"""


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_trainers.py").write_text(PLANTED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def measured(trainer: str) -> Finding:
    with world_size.begin(trainer) as probe:
        return run_check(world_size.CHECKS[0], probe)


def test_a_trainer_that_multiplies_is_a_defect() -> None:
    found = measured("planted_trainers:multiplied")
    assert found.figure == pytest.approx(WORLD_SIZE, rel=1e-4), found.detail
    assert found.status == "defect"
    assert found.detail == "The gradient of cross-entropy is 1.00 times that of one process."


def test_a_trainer_that_divides_is_not() -> None:
    found = measured("planted_trainers:divided")
    assert found.figure == pytest.approx(1.0, rel=1e-4), found.detail
    assert found.status == "ok"


@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
def test_trls_trainer_keeps_the_auxiliary_loss_out_of_it() -> None:
    assert measured("flanmoe.stages.doctor.trainers:sft_trainer").figure == pytest.approx(
        1.0, rel=1e-4
    )


def test_processes_that_break_are_an_error_and_are_gone() -> None:
    with world_size.begin("planted_trainers:breaking") as probe:
        # Where it does not break: the process that asks is no rank.
        found = run_check(world_size.CHECKS[0], probe)
    assert found.status == "error"
    assert "2 processes (gloo) must take one step, but ended with status 1" in found.detail
    assert found.detail.endswith("ValueError: this trainer breaks.")


def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def keep(*arguments: object, **options: object) -> "subprocess.Popen[bytes]":
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(world_size.subprocess, "Popen", keep)
    monkeypatch.setattr(world_size, "_MOST_SECONDS", 2.0)
    before = time.monotonic()
    found = measured("planted_trainers:hanging")
    assert time.monotonic() - before < 30
    assert found.status == "error"
    assert found.detail.startswith("TimeoutError: 2 processes must take one step within 2 seconds")
    assert not psutil.pid_exists(started[0].pid)
