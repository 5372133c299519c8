"""flanmoe's expert compute inside every native sparse model, against transformers' own eager
forward."""

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flanmoe.models.experts_interface import (
    EXPERTS_IMPLEMENTATION,
    experts_forward,
    register_experts_implementation,
)
from flanmoe.testing.tiny_models import SPARSE_NAMES, tiny_model


def _tokens() -> torch.Tensor:
    return torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_logits_and_gradients_equal_eager(name: str) -> None:
    model = tiny_model(name).double()
    results = {}
    for implementation in (EXPERTS_IMPLEMENTATION, "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        logits = model(_tokens(), use_cache=False).logits
        logits.square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results[implementation] = (logits.detach(), gradients)
    ours, theirs = results[EXPERTS_IMPLEMENTATION], results["eager"]
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for parameter, gradient in ours[1].items():
        torch.testing.assert_close(
            gradient, theirs[1][parameter], msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_the_model_really_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(module, *arguments):
        calls.append(module)
        return experts_forward(module, *arguments)

    model = tiny_model("mixtral")
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, EXPERTS_IMPLEMENTATION, counted)
    model(_tokens())
    assert len(calls) == model.config.num_hidden_layers


def test_registering_twice_changes_nothing() -> None:
    register_experts_implementation()
    assert ALL_EXPERTS_FUNCTIONS[EXPERTS_IMPLEMENTATION] is experts_forward
