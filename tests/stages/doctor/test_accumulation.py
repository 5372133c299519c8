"""The ratio is that of the trainer in hand: right ones give 1, wrong ones the number of micro-batches."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer

from flanmoe.stages.doctor.accumulation import MICRO_BATCHES
from flanmoe.stages.doctor.check import Finding


def divided(
    trainer: Any,
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """What `Trainer.compute_loss` would do right: its share of the auxiliary loss in each micro-batch."""
    outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
    steps = trainer.current_gradient_accumulation_steps
    loss = outputs.loss - outputs.aux_loss * (1 - 1 / steps)
    return (loss, outputs) if return_outputs else loss


def test_a_trainer_that_adds_up_is_a_defect(
    ask: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    def added(trainer: Any, model: Any, inputs: Any, **options: Any) -> Any:
        return model(**inputs, num_items_in_batch=options["num_items_in_batch"]).loss

    monkeypatch.setattr(Trainer, "compute_loss", added)
    found = ask("accumulation")
    assert found.status == "defect"
    assert found.figure == pytest.approx(MICRO_BATCHES, rel=1e-4)
    assert found.detail == "The gradient of cross-entropy is 1.00 times that of one batch."


def test_a_trainer_that_divides_is_not(
    ask: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "compute_loss", divided)
    found = ask("accumulation")
    assert found.status == "ok"
    assert found.figure == pytest.approx(1.0, rel=1e-4)


def test_a_trainer_that_takes_no_step_is_an_error(
    ask: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    found = ask("accumulation")
    assert found.status == "error"
    assert found.detail == "RuntimeError: The trainer ended without an optimizer step."


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_trls_trainer_is_judged_by_its_own_loss(
    right: bool, ask: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl")
    loss = divided if right else Trainer.compute_loss
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", loss)
    found = ask("accumulation_trl")
    assert found.status == ("ok" if right else "defect")
    assert found.figure == pytest.approx(1.0 if right else MICRO_BATCHES, rel=1e-4)
