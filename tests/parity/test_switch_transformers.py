"""Our Switch router and experts against transformers' Switch layer, from the same weights.

Where the layer differs from what a Switch layer should do the test asserts the difference and says
why; when transformers mends it, the test fails and says so.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
    load_balancing_loss_func,
)

from flanmoe.moe.compute import FusedExperts, expert_ffn
from flanmoe.moe.losses import balance_loss
from flanmoe.moe.routers import CapacityConfig, SwitchConfig
from flanmoe.moe.routing import Routing

HIDDEN, WIDTH = 8, 12


def layer(*, num_experts: int, capacity: int, seed: int, jitter: float = 0.0) -> torch.nn.Module:
    config = SwitchTransformersConfig(
        d_model=HIDDEN,
        d_ff=WIDTH,
        num_experts=num_experts,
        expert_capacity=capacity,
        router_jitter_noise=jitter,
        dropout_rate=0.0,
    )
    torch.manual_seed(seed)
    return SwitchTransformersSparseMLP(config)


def route(
    theirs: torch.nn.Module,
    hidden: Tensor,
    *,
    capacity: int,
    valid: Tensor | None = None,
    jitter: float = 0.0,
) -> Routing:
    num_experts = theirs.router.num_experts
    num_sequences, length, _ = hidden.shape
    # Their capacity is a number and not a factor; this factor gives that number.
    limit = CapacityConfig(
        train=capacity * num_experts / length, rounding="nearest", minimum=1, group="segment"
    )
    config = SwitchConfig(num_experts=num_experts, capacity=limit, jitter=jitter)
    router = config.build(hidden_size=HIDDEN)
    router.weight = theirs.router.classifier.weight
    segments = torch.arange(num_sequences).repeat_interleave(length)
    valid = None if valid is None else valid.flatten()
    return router(hidden.flatten(0, 1), segments=segments, valid=valid)


def output(theirs: torch.nn.Module, hidden: Tensor, routing: Routing) -> Tensor:
    experts = FusedExperts(
        gate_up=torch.stack([expert.wi.weight for expert in theirs.experts.values()]),
        down=torch.stack([expert.wo.weight for expert in theirs.experts.values()]),
        combine=F.relu,
    )
    return expert_ffn(hidden.flatten(0, 1), *routing.slots(), experts).view_as(hidden)


class Case(NamedTuple):
    num_experts: int
    capacity: int
    num_sequences: int
    length: int
    seed: int

    def build(self) -> tuple[torch.nn.Module, Tensor]:
        theirs = layer(num_experts=self.num_experts, capacity=self.capacity, seed=self.seed)
        return theirs, torch.randn(self.num_sequences, self.length, HIDDEN)


cases = st.builds(
    Case,
    num_experts=st.integers(2, 6),
    capacity=st.integers(1, 12),
    num_sequences=st.integers(1, 3),
    length=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)


@given(cases)
def test_output_and_gradients_equal_theirs(case: Case) -> None:
    theirs, hidden = case.build()
    hidden.requires_grad_()
    leaves = [hidden, *theirs.parameters()]
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    expected = theirs(hidden)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    found = output(theirs, hidden, route(theirs, hidden, capacity=case.capacity))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    gradients = torch.autograd.grad(
        (found * weights).sum(), leaves, allow_unused=True, materialize_grads=True
    )
    for one, other in zip(gradients, wanted, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@given(cases)
def test_balance_loss_of_a_sequence_equals_theirs(case: Case) -> None:
    theirs, hidden = case.build()
    logits = F.linear(hidden[:1], theirs.router.classifier.weight)
    probabilities = logits.softmax(dim=-1)
    expected = load_balancing_loss_func(probabilities, probabilities.argmax(dim=-1))
    # The choices count before capacity, dropped or not.
    found = balance_loss(route(theirs, hidden[:1], capacity=case.capacity))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_padding_takes_places_in_their_layer_and_not_in_ours() -> None:
    # Their option to ignore padding is stored and never read.
    theirs = layer(num_experts=2, capacity=2, seed=0)
    with torch.no_grad():
        theirs.router.classifier.weight.zero_()
        theirs.router.classifier.weight[0, 0] = 9.0
    hidden = torch.ones(1, 6, HIDDEN)
    valid = torch.tensor([[False, False, False, True, True, True]])
    served = theirs(hidden).abs().sum(dim=-1) > 0
    assert served.tolist() == [[True, True, False, False, False, False]], "transformers mended it"
    # Half of the tokens are real: twice the factor for the same two places.
    routing = route(theirs, hidden, capacity=4, valid=valid)
    assert routing.token_ids.tolist() == [3, 4]


def test_jitter_reaches_the_experts_in_their_layer_and_not_in_ours() -> None:
    # They multiply the hidden states in place, and the experts are given the same tensor.
    theirs = layer(num_experts=2, capacity=64, seed=0, jitter=0.5).train()
    hidden = torch.randn(1, 6, HIDDEN)
    given = hidden.clone()
    with torch.no_grad():
        theirs(given)
    assert not torch.equal(given, hidden), "transformers mended it"
    given = hidden.clone()
    noisy = route(theirs, given, capacity=64, jitter=0.5)
    assert torch.equal(given, hidden)
    assert not torch.equal(noisy.logits, route(theirs, given, capacity=64).logits)
