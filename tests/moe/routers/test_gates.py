"""Gates and their gradients; jitter; scores in float32; padding that is not finite."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import ConfigError
from flanmoe.moe.layer import Experts, ExpertsConfig, SparseFFN
from flanmoe.moe.losses import balance_loss, importance_loss, z_loss
from flanmoe.moe.routers import (
    CapacityConfig,
    ExpertChoiceConfig,
    GShardConfig,
    RouterConfig,
    SwitchConfig,
    TopKConfig,
)
from flanmoe.testing.routing import router_of_logits

KINDS: dict[str, Callable[..., RouterConfig]] = {
    "switch": SwitchConfig,
    "gshard": lambda **options: GShardConfig(second_choice="all", **options),
    "top_k": TopKConfig,
    "expert_choice": ExpertChoiceConfig,
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def logits_of(seed: int, num_tokens: int = 6, num_experts: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)


def switch(gate: Any, **options: Any) -> Any:
    capacity = CapacityConfig(train=None)
    return router_of_logits(SwitchConfig(num_experts=4, gate=gate, capacity=capacity, **options))


def gradient(router: Any, logits: torch.Tensor, token: int) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(router(leaf).gates[token], leaf)
    return found[token]


@given(seed=st.integers(0, 1000))
def test_the_gate_of_switch_is_p_and_so_is_its_gradient(seed: int) -> None:
    logits = logits_of(seed)
    routing = switch("probability")(logits)
    for token, row in enumerate(logits.tolist()):
        exponentials = [math.exp(value) for value in row]
        p = [value / sum(exponentials) for value in exponentials]
        own = max(range(4), key=lambda expert: p[expert])
        assert routing.expert_ids[token] == own
        assert routing.gates[token].item() == pytest.approx(p[own], rel=1e-12)
        # dp_i / dz_j = p_i ((i = j) - p_j)
        expected = [p[own] * ((expert == own) - p[expert]) for expert in range(4)]
        found = gradient(switch("probability"), logits, token)
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.01, 1.0, 10.0]))
def test_a_straight_through_gate_is_exactly_1_with_the_gradient_of_log_p(
    seed: int, scale: float
) -> None:
    logits = scale * logits_of(seed)
    for dtype in (torch.float32, torch.float64):
        assert switch("straight_through")(logits.to(dtype)).gates.tolist() == [1.0] * 6
    for token, row in enumerate(logits):
        p = row.softmax(dim=0)
        # d(p / p') / dz_j = (i = j) - p_j, p' held fixed.
        expected = torch.eye(4, dtype=torch.float64)[row.argmax()] - p
        found = gradient(switch("straight_through"), logits, token)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_renormalised_single_gate_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        TopKConfig.parse({"num_experts": 4, "top_k": 1}, origin="router")
    assert str(caught.value) == (
        "router has 1 problem:\n"
        "  (top level): `normalize` must be false when `top_k` is 1, but is true: a single "
        "renormalised gate is always 1 and gives the router no gradient"
    )
    assert TopKConfig(num_experts=4, top_k=1, normalize=False).top_k == 1


@given(seed=st.integers(0, 1000))
def test_renormalised_gates_have_the_gradient_of_a_softmax_over_the_chosen(seed: int) -> None:
    logits = logits_of(seed)
    router = router_of_logits(TopKConfig(num_experts=4, top_k=2))
    leaf = logits.clone().requires_grad_()
    gates = router(leaf).gates.view(6, 2)
    chosen = leaf.gather(1, logits.topk(2).indices).softmax(dim=1)
    torch.testing.assert_close(gates, chosen, rtol=5e-9, atol=0)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (found,) = torch.autograd.grad((gates * weights).sum(), leaf)
    (expected,) = torch.autograd.grad((chosen * weights).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@EVERY_KIND
def test_jitter_multiplies_the_routers_input_in_training_alone(kind: str) -> None:
    config = KINDS[kind](num_experts=3, jitter=0.1)
    router = router_of_logits(config)
    hidden = torch.full((2000, 3), 2.0)
    before = hidden.clone()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = router.train()(hidden).logits / 2
    # From 0.9 to 1.1, each element for itself, evenly: the standard deviation is 0.1 / sqrt(3).
    assert 0.9 <= noisy.min() < 0.902
    assert 1.098 < noisy.max() <= 1.1
    assert noisy.std().item() == pytest.approx(0.0577, abs=0.002)
    assert noisy.std(dim=1).min() > 0
    assert torch.equal(hidden, before)
    assert torch.equal(router.eval()(hidden).logits, hidden)


def test_experts_see_the_input_without_jitter() -> None:
    torch.manual_seed(0)
    config = SwitchConfig(
        num_experts=2, jitter=0.5, gate="straight_through", capacity=CapacityConfig(train=None)
    )
    block = SparseFFN(
        config.build(hidden_size=4), Experts(ExpertsConfig(num_experts=2, expert_width=3), 4)
    )
    for matrices in block.experts.parameters():
        matrices.data[1] = matrices.data[0]
    hidden = torch.randn(8, 4)
    # Both experts are the same and the gate is 1: noise could only come in through the input.
    torch.testing.assert_close(block.train()(hidden), block.eval()(hidden), rtol=1e-5, atol=1e-6)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32_whatever_the_input_and_autocast(kind: str, dtype: torch.dtype) -> None:
    router = KINDS[kind](num_experts=3, init_std=1.0).build(hidden_size=5).eval()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 5, generator=generator).to(dtype)
    exact = hidden.float() @ router.weight.T
    plain = router(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = router(hidden)
    for routing in (plain, under_autocast):
        assert routing.logits.dtype == routing.gates.dtype == torch.float32
        torch.testing.assert_close(routing.logits, exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(plain.expert_ids, under_autocast.expert_ids)


def test_a_bfloat16_router_computes_in_float32_too() -> None:
    router = TopKConfig(num_experts=3).build(hidden_size=5).bfloat16()
    hidden = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = hidden.float() @ router.weight.float().T
    torch.testing.assert_close(router(hidden).logits, exact, rtol=1e-6, atol=1e-6)
    assert TopKConfig(num_experts=3).build(hidden_size=5)(hidden.double()).gates.dtype == (
        torch.float64
    )


def test_rounding_to_bfloat16_would_have_tied_the_experts() -> None:
    # 1 + 2^-10 is no bfloat16; as one, both experts were equal and the lower would win.
    router = router_of_logits(TopKConfig(num_experts=2, top_k=1, normalize=False))
    router.weight.data = torch.tensor([[1.0, 0.0], [1.0, 2.0**-10]])
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.ones(1, 2)).expert_ids.tolist() == [1]


@pytest.mark.parametrize("noise", [math.nan, math.inf])
@EVERY_KIND
def test_padding_that_is_not_finite_reaches_neither_losses_nor_gradients(
    kind: str, noise: float
) -> None:
    hidden = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    router = KINDS[kind](num_experts=4, init_std=1.0).build(hidden_size=4)
    valid = torch.arange(6) < 4

    def weight_gradient(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        routing = router(tokens, valid=mask)
        losses = balance_loss(routing) + importance_loss(routing) + z_loss(routing)
        weights = torch.arange(len(routing.gates))
        (found,) = torch.autograd.grad(losses + (routing.gates * weights).sum(), router.weight)
        return found

    spoilt = hidden.clone()
    spoilt[4:] = noise
    expected = weight_gradient(hidden[:4], valid[:4])
    assert expected.abs().sum() > 0.1
    torch.testing.assert_close(weight_gradient(spoilt, valid), expected, rtol=1e-5, atol=1e-6)
