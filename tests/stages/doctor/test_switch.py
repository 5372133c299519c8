"""Switch as it should be passes, and as it should not be does not."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import SwitchTransformersForConditionalGeneration as Switch

from flanmoe.stages.doctor.check import Finding

Ask = Callable[[str], Finding]


def plant(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, dict[str, Any]], dict[str, Any]]
) -> None:
    """Change what a Switch is called with."""
    forward = Switch.forward
    monkeypatch.setattr(
        Switch, "forward", lambda model, **given: forward(model, **change(model, given))
    )


def by_configuration(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    configured = getattr(model.config, "output_router_logits", False)
    asked = given.get("output_router_logits", configured)
    return {**given, "output_router_logits": asked}


def by_keyword(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "output_router_logits": given.get("output_router_logits", False)}


def without_padding(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    real = given["attention_mask"].any(dim=0)
    return {**given, **{key: given[key][:, real] for key in ("input_ids", "attention_mask")}}


@pytest.mark.parametrize(
    ("change", "figure", "status"), [(by_configuration, 1.0, "ok"), (by_keyword, 0.0, "defect")]
)
def test_the_configuration_is_read_or_not(
    change: Any, figure: float, status: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, change)
    found = ask("switch_config_flag")
    assert (found.status, found.figure) == (status, pytest.approx(figure, abs=1e-4)), found.detail


@pytest.mark.parametrize("name", ["switch_padding_balance", "switch_padding_z"])
def test_losses_without_padding_pass(name: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, without_padding)
    found = ask(name)
    assert (found.status, found.figure) == ("ok", pytest.approx(1.0, abs=1e-5))


@pytest.mark.parametrize(
    ("name", "loss"),
    [("switch_padding_balance", "encoder_aux_loss"), ("switch_padding_z", "encoder_z_loss")],
)
def test_losses_that_grow_with_padding_do_not(
    name: str, loss: str, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, without_padding)
    forward = Switch.forward

    def grown(model: Any, **given: Any) -> Any:
        output = forward(model, **given)
        length = given["attention_mask"].shape[1]
        output[loss] = output[loss] * length / 10
        return output

    monkeypatch.setattr(Switch, "forward", grown)
    found = ask(name)
    assert (found.status, found.figure) == ("defect", pytest.approx(4.0, rel=1e-4))
