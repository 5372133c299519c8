"""Families that refuse a layer's own number of experts pass, those that ignore it do not."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import MixtralForCausalLM, Qwen3MoeForCausalLM

from flanmoe.stages.doctor import layer_counts
from flanmoe.stages.doctor.check import Finding
from flanmoe.stages.doctor.tiny import tiny_config

Ask = Callable[[str], Finding]


@pytest.fixture(autouse=True)
def two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    known = layer_counts.FAMILIES
    monkeypatch.setattr(
        layer_counts, "FAMILIES", {name: known[name] for name in ("mixtral", "qwen3_moe")}
    )


def refuse(monkeypatch: pytest.MonkeyPatch, family: Any) -> None:
    init = family.__init__

    def refusing(model: Any, config: Any, **options: Any) -> None:
        if config.is_heterogeneous:
            raise ValueError("one number of experts for all layers")
        init(model, config, **options)

    monkeypatch.setattr(family, "__init__", refusing)


def test_refusing_passes(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, MixtralForCausalLM)
    refuse(monkeypatch, Qwen3MoeForCausalLM)
    found = ask("per_layer_experts")
    assert (found.status, found.figure) == ("ok", 0)
    assert found.detail == "A layer with 4 of 8 experts is refused by mixtral, qwen3_moe."


def test_ignoring_does_not(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def lenient(family: str, **values: Any) -> Any:
        values.pop("per_layer_config")
        return tiny_config(family, **values)

    monkeypatch.setattr(layer_counts, "tiny_config", lenient)
    found = ask("per_layer_experts")
    assert (found.status, found.figure) == ("defect", 2)
    assert found.detail == "A layer with 4 of 8 experts is ignored by mixtral, qwen3_moe."


def test_building_passes(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block:
        def __init__(self, num_experts: int) -> None:
            self.num_experts = num_experts

    monkeypatch.setattr(layer_counts, "meta_model", lambda config: None)
    monkeypatch.setattr(layer_counts, "moe_blocks", lambda model: [Block(8), Block(4)])
    found = ask("per_layer_experts")
    assert (found.status, found.figure) == ("ok", 0)
    assert found.detail == "A layer with 4 of 8 experts is built by mixtral, qwen3_moe."
