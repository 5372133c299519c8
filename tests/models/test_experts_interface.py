"""flanmoe's expert compute inside every native sparse model,
against transformers' own eager forward."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flanmoe.core.errors import ModelError
from flanmoe.models.experts_interface import (
    EXPERTS_IMPLEMENTATION,
    KERNELS,
    experts_forward,
    register_experts_implementation,
)
from flanmoe.moe.compute import triton_pass
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


class _Plain(torch.nn.Module):
    """Experts without a gate, with transposed matrices, biases and a norm behind them."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = False, True, True, True
    config = SimpleNamespace(_experts_implementation=EXPERTS_IMPLEMENTATION)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator))

        self.up_proj, self.up_proj_bias = normal(3, 5, 4), normal(3, 4)
        self.down_proj, self.down_proj_bias = normal(3, 4, 5), normal(3, 5)
        self.act_fn = torch.nn.ReLU()
        self.post_expert_norm = torch.nn.LayerNorm(5)


def test_experts_without_a_gate_and_with_a_norm_behind_them() -> None:
    module = _Plain()
    hidden = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    expert_ids = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2], [2, 0], [0, 2]])
    gates = torch.linspace(0.1, 0.9, 14).view(7, 2)
    expected = torch.zeros(7, 5)
    for token, choice in torch.cartesian_prod(torch.arange(7), torch.arange(2)).tolist():
        expert = expert_ids[token, choice]
        inner = module.act_fn(hidden[token] @ module.up_proj[expert] + module.up_proj_bias[expert])
        output = inner @ module.down_proj[expert] + module.down_proj_bias[expert]
        expected[token] += gates[token, choice] * module.post_expert_norm(output)
    torch.testing.assert_close(experts_forward(module, hidden, expert_ids, gates), expected)


def test_registering_twice_changes_nothing() -> None:
    register_experts_implementation()
    for name in KERNELS:
        assert ALL_EXPERTS_FUNCTIONS[name] is experts_forward


def test_kernels_of_ours_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_pass, "available", lambda: False)
    model = tiny_model("mixtral")
    model.set_experts_implementation("flanmoe_triton")
    with pytest.raises(
        ModelError, match=r"^Triton's kernels for experts need the package `triton`"
    ):
        model(_tokens())
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    model(_tokens())
