"""Leaks that are planted are found, and none where there is none."""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening, MixtralForCausalLM

from flanmoe.models.packing import keeps_examples_apart
from flanmoe.stages.doctor import packing
from flanmoe.stages.doctor.check import Finding
from flanmoe.testing.tiny_models import DENSE_NAMES, SPARSE_NAMES, tiny_model

Ask = Callable[[str], Finding]
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")


@pytest.mark.parametrize("name", DENSE_NAMES + SPARSE_NAMES)
def test_it_agrees_with_the_trainers_own_test(name: str) -> None:
    model = tiny_model(name)
    apart = packing.moved(model, use_cache=False) <= packing.TOLERANCE
    assert apart == keeps_examples_apart(model)


def test_the_distance_is_in_standard_deviations_and_of_the_row_that_moved_less() -> None:
    before = torch.tensor([[[1.0, -1.0]], [[1.0, -1.0]]])
    after = before + torch.tensor([[[0.0, 3.0]], [[-2.0, 0.5]]])
    spread = float(before.double().std())
    assert packing._distance(before, after) == pytest.approx(2.0 / spread)


@pytest.mark.parametrize("name", ["packing_with_mask", "packing_with_cache"])
def test_a_model_that_leaves_mask_and_cache_aside_passes(
    name: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MixtralForCausalLM.forward

    def by_positions_alone(model: Any, **given: Any) -> Any:
        return forward(model, **{**given, "attention_mask": None, "use_cache": False})

    monkeypatch.setattr(MixtralForCausalLM, "forward", by_positions_alone)
    found = ask(name)
    assert found.status == "ok"
    assert found.figure == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("name", ["packing_with_mask", "packing_with_cache", "packing_collator"])
def test_a_model_that_does_not_read_positions_leaks(
    name: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MixtralForCausalLM.forward

    # Trainers drop what the signature does not name.
    @functools.wraps(forward)
    def without_positions(model: Any, **given: Any) -> Any:
        return forward(model, **{**given, "position_ids": None})

    monkeypatch.setattr(MixtralForCausalLM, "forward", without_positions)
    found = ask(name)
    assert found.status == "defect"
    assert found.figure is not None
    assert found.figure > 1


@pytest.mark.parametrize(
    ("families", "status", "said"),
    [
        (["mixtral", "olmoe"], "ok", "none; apart: mixtral, olmoe."),
        (["gpt_oss"], "defect", "; apart: none."),
    ],
)
def test_families_are_named(
    families: list[str], status: str, said: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = packing.FAMILIES
    monkeypatch.setattr(packing, "FAMILIES", {name: known[name] for name in families})
    found = ask("packing_families")
    assert found.status == status
    assert found.detail.endswith(said)


def test_a_collator_that_adds_a_mask_leaks(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask("packing_collator").status == "ok"
    collate = DataCollatorWithFlattening.__call__

    def masked(collator: Any, features: Any, **options: Any) -> Any:
        batch = collate(collator, features, **options)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    monkeypatch.setattr(DataCollatorWithFlattening, "__call__", masked)
    found = ask("packing_collator")
    assert found.status == "defect"
    assert found.figure is not None
    assert found.figure > 1


@needs_trl
@pytest.mark.parametrize(("leaks", "status"), [(False, "ok"), (True, "defect")])
def test_trls_rows(leaks: bool, status: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    sft = packing.sft_trainer

    def changed(job: Any, **options: Any) -> Any:
        trainer = sft(job, **options)
        collate = trainer.data_collator

        def collator(rows: Any) -> Any:
            batch = collate(rows)
            length = batch["input_ids"].shape[1]
            positions = (
                torch.arange(length)
                if leaks
                else torch.cat([torch.arange(packing._FRONT), torch.arange(packing._BACK)])
            )
            return {"input_ids": batch["input_ids"], "position_ids": positions[None]}

        trainer.data_collator = collator
        return trainer

    monkeypatch.setattr(packing, "sft_trainer", changed)
    found = ask("packing_trl")
    assert found.status == status, found.detail
