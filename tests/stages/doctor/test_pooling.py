"""The score of four collapsed layers, with a loss that pools them and one that does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.mixtral import modeling_mixtral

from flanmoe.stages.doctor.check import Finding


def of_one_layer(logits: torch.Tensor, num_experts: int, top_k: int) -> torch.Tensor:
    """The written-out definition: E times the sum over experts of load times mean probability."""
    probabilities = logits.softmax(-1)
    loss = torch.tensor(0.0)
    for expert in range(num_experts):
        chosen = probabilities.topk(top_k, dim=-1).indices
        load = (chosen == expert).any(dim=-1).float().mean()
        loss = loss + num_experts * load * probabilities[:, expert].mean()
    return loss


@pytest.mark.parametrize(
    ("pooled", "figure", "status"), [(True, 1.0, "defect"), (False, 4.0, "ok")]
)
def test_the_loss_decides(
    pooled: bool,
    figure: float,
    status: str,
    ask: Callable[[str], Finding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loss(layers: Any, num_experts: int, top_k: int, **options: Any) -> torch.Tensor:
        parts = [torch.cat(layers)] if pooled else layers
        return torch.stack([of_one_layer(part, num_experts, top_k) for part in parts]).mean()

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", loss)
    found = ask("pooled_layers")
    assert found.status == status
    assert found.figure == pytest.approx(figure, abs=1e-4)
    assert found.expected == pytest.approx(4.0, abs=1e-4)
