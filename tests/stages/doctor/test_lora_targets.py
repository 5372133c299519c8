"""PEFT with the defects taken out, and with one put in."""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest

from flanmoe.stages.doctor.check import Finding

Ask = Callable[[str], Finding]
Adapt = Callable[..., Any]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Adapt], None]:
    """Puts a function of (PEFT's own, model, configuration) in the place of `get_peft_model`."""
    own = peft.get_peft_model

    def put(changed: Adapt) -> None:
        monkeypatch.setattr(
            peft, "get_peft_model", lambda model, config, **_: changed(own, model, config)
        )

    return put


def test_names_that_match_nothing_pass_when_they_are_refused(
    ask: Ask, plant: Callable[[Adapt], None]
) -> None:
    def refusing(own: Adapt, model: Any, config: Any) -> Any:
        raise ValueError("`gate_proj` matches nothing")

    plant(refusing)
    found = ask("lora_foreign_names")
    assert (found.status, found.figure) == ("ok", 0)
    assert found.detail == "PEFT refuses them: `gate_proj` matches nothing"


def test_names_that_match_nothing_pass_when_all_are_named_in_a_warning(
    ask: Ask, plant: Callable[[Adapt], None]
) -> None:
    named = ["gate_proj", "up_proj"]

    def warning(own: Adapt, model: Any, config: Any) -> Any:
        warnings.warn(f"these match nothing: {named}", stacklevel=1)
        return own(model, config)

    plant(warning)
    assert (ask("lora_foreign_names").status, ask("lora_foreign_names").figure) == ("defect", 1)
    named.append("down_proj")
    assert ask("lora_foreign_names").status == "ok"


def test_names_that_reach_experts_after_all_pass(ask: Ask, plant: Callable[[Adapt], None]) -> None:
    plant(
        lambda own, model, config: own(
            model, peft.LoraConfig(r=2, target_modules=["w1", "w2", "w3"])
        )
    )
    found = ask("lora_foreign_names")
    assert (found.status, found.detail) == ("ok", "They reach 4 expert tensors.")


def test_silence_is_a_defect(ask: Ask, plant: Callable[[Adapt], None]) -> None:
    attention = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    plant(lambda own, model, config: own(model, attention))
    found = ask("lora_foreign_names")
    assert (found.status, found.figure) == ("defect", 3)
    assert found.detail.startswith("Expert tensors adapted: 0 of 4; trainable parameters: 512")


def test_all_linear_without_routers_passes(ask: Ask, plant: Callable[[Adapt], None]) -> None:
    names = ["q_proj", "w1", "w2", "w3"]
    plant(lambda own, model, config: own(model, peft.LoraConfig(r=2, target_modules=names)))
    found = ask("lora_all_linear_router")
    assert (found.status, found.figure) == ("ok", 0)
    assert found.detail.endswith("Expert tensors adapted: 4 of 4.")


def test_all_linear_with_routers_does_not(ask: Ask, plant: Callable[[Adapt], None]) -> None:
    tensors = ["mlp.gate.weight"]
    plant(
        lambda own, model, config: own(
            model, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=tensors)
        )
    )
    found = ask("lora_all_linear_router")
    assert (found.status, found.figure) == ("defect", 2)


def test_own_names_that_are_not_applied_are_a_defect(
    ask: Ask, plant: Callable[[Adapt], None]
) -> None:
    def frozen(own: Adapt, model: Any, config: Any) -> Any:
        adapted = own(model, config)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("layers.0" in name and parameter.requires_grad)
        return adapted

    plant(lambda own, model, config: own(model, config))
    assert (ask("lora_own_names").status, ask("lora_own_names").figure) == ("ok", 4)
    plant(frozen)
    assert (ask("lora_own_names").status, ask("lora_own_names").figure) == ("defect", 2)
