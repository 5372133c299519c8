"""NLLB-MoE with an expert loop that serves the router's choices, and with one that serves some of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from flanmoe.stages.doctor.check import Finding


@pytest.mark.parametrize(
    ("first", "status"), [(0, "ok"), (4, "defect")], ids=["every expert", "the second half"]
)
def test_calls_are_compared_with_choices(
    first: int, status: str, ask: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(experts: Any, hidden: torch.Tensor, mask: Any, gates: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for number in range(experts.num_experts):
            expert = experts[f"expert_{number}"]
            tokens = gates[:, number].nonzero()[:, 0]
            if number >= first and len(tokens):
                total[tokens] += expert(hidden[tokens]) * gates[tokens, number, None]
        return total

    monkeypatch.setattr(NllbMoeExperts, "forward", served)
    found = ask("nllb_experts")
    assert found.status == status, found.detail
    assert found.figure is not None
    assert (found.figure == 1.0) if first == 0 else (0.1 < found.figure < 0.9)
    called = found.detail.rpartition("called with: ")[2].strip("[].").split(", ")
    assert [int(number) > 0 for number in called] == [number >= first for number in range(8)]
