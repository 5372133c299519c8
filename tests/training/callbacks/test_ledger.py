"""The ledger adds up what the steps report."""

import mmap
import time
from collections.abc import Callable

import pytest
import torch

from flanmoe.core.memory import peak_memory_bytes
from flanmoe.training.callbacks.ledger import LedgerKeeper
from flanmoe.training.report import StepReport

Report = Callable[..., StepReport]


def keeper() -> LedgerKeeper:
    return LedgerKeeper(flops_per_token=300.0, device=torch.device("cpu"))


def test_costs_add_up(report: Report) -> None:
    made = keeper()
    made.start(0)
    for step in (1, 2, 3):
        made.after_step(report(step))
    ledger = made.ledger
    assert (ledger.sequences, ledger.steps) == (12, 3)
    assert (ledger.real_tokens, ledger.padding_tokens, ledger.loss_tokens) == (90, 30, 36)
    # Padding is computed too.
    assert ledger.flops == pytest.approx(3 * 40 * 300)
    assert ledger.peak_memory_bytes > 2**20


def test_the_counting_pass_is_a_forward_pass_more(report: Report) -> None:
    made = keeper()
    made.after_step(report(1, counted_tokens=40, counting_seconds=0.25))
    made.after_step(report(2))
    assert made.counting.flops == pytest.approx(40 * 300 / 3)
    assert made.counting.seconds == 0.25
    assert made.ledger.flops == pytest.approx(2 * 40 * 300 + 40 * 300 / 3)


def test_seconds_are_those_between_start_and_the_last_step(report: Report) -> None:
    made = keeper()
    time.sleep(0.05)
    made.start(0)
    time.sleep(0.03)
    made.after_step(report(1))
    time.sleep(0.03)
    made.after_step(report(2))
    assert 0.06 <= made.ledger.seconds < 0.11


def test_the_peak_holds_what_came_before_training(report: Report) -> None:
    with mmap.mmap(-1, 150_000_000) as block:
        for start in range(0, len(block), 4096):
            block[start] = 1
    before = peak_memory_bytes()
    made = keeper()
    made.start(0)
    made.after_step(report(1))
    assert made.ledger.peak_memory_bytes >= before
    assert peak_memory_bytes() >= before


def test_a_resumed_run_goes_on_from_its_costs(report: Report) -> None:
    made = keeper()
    made.after_step(report(1, counted_tokens=40, counting_seconds=0.25))
    other = keeper()
    other.load_state_dict(made.state_dict())
    assert other.ledger == made.ledger
    assert other.counting == made.counting
    other.after_step(report(2))
    assert other.ledger.steps == 2
    assert other.ledger.seconds >= made.ledger.seconds
