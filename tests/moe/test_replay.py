"""A pass that is computed again goes where it went before."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flanmoe.moe.layer import Experts, ExpertsConfig, SparseFFN
from flanmoe.moe.replay import RoutingReplay
from flanmoe.moe.routers import parse_router

KINDS: dict[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k", "num_experts": 4},
    "switch": {"kind": "switch", "num_experts": 4, "capacity": {"train": 0.5, "minimum": 1}},
    "gshard": {"kind": "gshard", "num_experts": 4, "capacity": {"train": 1.0, "minimum": 1}},
    "st_moe": {"kind": "st_moe", "num_experts": 4},
    "expert_choice": {"kind": "expert_choice", "num_experts": 4},
}


def layer(kind: str, *, jitter: float = 0.0) -> SparseFFN:
    torch.manual_seed(0)
    router = parse_router({**KINDS[kind], "jitter": jitter}).build(hidden_size=8)
    experts = Experts(ExpertsConfig(num_experts=4, expert_width=6), 8)
    return SparseFFN(router, experts).double().train()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_pass(kind: str) -> None:
    """With noise on the router's input and second choices that are drawn."""
    block = layer(kind, jitter=0.3)
    hidden = torch.randn(3, 7, 8, dtype=torch.double)

    def gradients(*, again: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        inputs = hidden.clone().requires_grad_()
        if again:
            replay = RoutingReplay()
            outputs: Any = checkpoint(
                lambda tokens: block(tokens, replay=replay), inputs, use_reentrant=False
            )
        else:
            outputs = block(inputs)
        return list(torch.autograd.grad(outputs.square().sum(), [inputs, *block.parameters()]))

    for found, expected in zip(gradients(again=True), gradients(again=False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tie_that_rounding_would_turn_is_not_routed_anew(kind: str) -> None:
    """The second pass scores all experts in the reverse order; where tokens go must not change."""
    block = layer(kind)
    replay, went = RoutingReplay(), []
    weight = block.router.weight.detach().clone()
    block.router.register_forward_hook(lambda _, __, routing: went.append(routing))
    hidden = torch.randn(2, 5, 8, dtype=torch.double)
    for second in (False, True):
        with torch.no_grad():
            block.router.weight.copy_(weight.flip(0) if second else weight)
        block(hidden, replay=replay)
    first, again = went
    assert torch.equal(first.token_ids, again.token_ids)
    assert torch.equal(first.expert_ids, again.expert_ids)
    assert torch.equal(first.choices.asked, again.choices.asked)
    # Gates come from the scores of the pass that has the gradient.
    assert not torch.equal(first.gates, again.gates)
    anew = block.router(hidden.flatten(0, 1))
    assert not torch.equal(anew.expert_ids, first.expert_ids)
