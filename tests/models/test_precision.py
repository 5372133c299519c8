"""What `precision: auto` becomes, by what the machine has instructions for."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flanmoe.models.precision import computes_bfloat16
from flanmoe.training.arguments import TuneConfig


@pytest.fixture(autouse=True)
def _found_anew() -> Iterator[None]:
    computes_bfloat16.cache_clear()
    yield
    computes_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, "float32"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_auto_follows_the_processor(
    capabilities: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    config = TuneConfig.parse({"precision": "auto"})
    assert config.precision == expected
    # What is written down is what was found: another machine computes the same.
    assert config.to_mapping()["precision"] == expected


@pytest.mark.parametrize("native", [True, False])
def test_auto_follows_the_accelerator(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def supported(**options: Any) -> bool:
        asked.append(options)
        return native

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = "bfloat16" if native else "float32"
    assert TuneConfig.parse({"precision": "auto"}).precision == expected
    assert asked == [{"including_emulation": False}]


def test_what_is_named_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert TuneConfig.parse({"precision": "bfloat16"}).precision == "bfloat16"
    assert TuneConfig().precision == "bfloat16"
