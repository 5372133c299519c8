"""The written-out definitions on cases done by hand, and the contract on routings that break it."""

import dataclasses
from typing import Any

import pytest
import torch

from flanmoe.moe.routers import SwitchConfig
from flanmoe.moe.routing import Choices, Routing
from flanmoe.testing.routing import (
    RouterInputs,
    best_experts_written_out,
    check_routing,
    expert_choice_written_out,
    router_of_logits,
    token_choice_written_out,
)


def routing(**changes: Any) -> Routing:
    """Three tokens, the last of them padding; token 1's second choice did not fit."""
    whole = Routing(
        token_ids=torch.tensor([0, 0, 1]),
        expert_ids=torch.tensor([2, 1, 2]),
        gates=torch.tensor([0.7, 0.3, 0.6]),
        logits=torch.zeros(3, 3),
        valid=torch.tensor([True, True, False]),
        segments=torch.tensor([0, 0, 0]),
        choices=Choices(
            expert_ids=torch.tensor([[2, 1], [2, 0], [0, 1]]),
            asked=torch.tensor([[True, True], [True, True], [False, False]]),
        ),
    )
    return dataclasses.replace(whole, **changes)


def test_a_sound_routing_passes() -> None:
    check_routing(routing(), groups=[0, 0, 0], capacities={0: 2})


ASKED = torch.ones(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids": torch.tensor([2, 2, 2])}, r"is assigned twice: \[\(0, 2\)\]"),
        ({"expert_ids": torch.tensor([2, 3, 2])}, r"no such \(token, expert\): \[\(0, 3\)\]"),
        ({"token_ids": torch.tensor([0, -1, 1])}, r"no such \(token, expert\): \[\(-1, 1\)\]"),
        ({"valid": torch.tensor([True, False, False])}, r"padding is served: \[\(1, 2\)\]"),
        (
            {"choices": Choices(torch.tensor([[2, 1], [2, 0], [0, 1]]), ASKED)},
            r"padding asks for experts: \[2\]",
        ),
        ({"gates": torch.tensor([0.7, 0.0, 0.6])}, r"at most 1: \{\(0, 1\): 0.0\}"),
        ({"gates": torch.tensor([0.7, 1.1, 0.6])}, r"at most 1: \{\(0, 1\): 1.1"),
        ({"gates": torch.tensor([0.7, float("nan"), 0.6])}, r"at most 1: \{\(0, 1\): nan\}"),
        (
            {"choices": Choices(torch.tensor([[2, 1], [2, 2], [0, 1]]), routing().choices.asked)},
            r"choices of a token must differ, tokens: \[1\]",
        ),
        (
            {"expert_ids": torch.tensor([2, 0, 2])},
            r"kept without having been asked for: \[\(0, 0\)",
        ),
    ],
)
def test_a_broken_routing_is_seen(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_routing(routing(**changes))


def test_an_overfull_expert_is_seen_group_by_group() -> None:
    with pytest.raises(AssertionError, match=r"at \(group, expert\): \{\(0, 2\): 2\}"):
        check_routing(routing(), groups=[0, 0, 0], capacities={0: 1})
    check_routing(routing(), groups=[0, 1, 0], capacities={0: 1, 1: 1})


def test_of_equal_experts_the_lower_number_comes_first() -> None:
    assert best_experts_written_out([[0.2, 0.4, 0.4], [0.5, 0.1, 0.4]], 2) == [[1, 2], [0, 2]]


def test_first_choices_are_all_placed_before_second_ones() -> None:
    choices = [[0, 1], [1, 0], [0, 1]]
    asked = [[True, True], [True, False], [True, True]]
    unlimited = token_choice_written_out(choices, asked, groups=[0] * 3, capacities=None)
    assert unlimited == {(0, 0): 0, (1, 1): 0, (2, 0): 1, (0, 1): 1, (2, 1): 2}
    tight = token_choice_written_out(choices, asked, groups=[0] * 3, capacities={0: 1})
    assert tight == {(0, 0): 0, (1, 1): 0}
    surest = token_choice_written_out(
        choices, asked, groups=[0] * 3, capacities={0: 1}, confidence=[0.5, 0.9, 0.8]
    )
    assert surest == {(2, 0): 0, (1, 1): 0}
    apart = token_choice_written_out(choices, asked, groups=[0, 0, 5], capacities={0: 1, 5: 1})
    assert apart == {(0, 0): 0, (1, 1): 0, (2, 0): 0, (2, 1): 0}


def test_experts_choose_among_the_tokens_of_a_group() -> None:
    probabilities = [[0.9, 0.1], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8]]
    pairs = expert_choice_written_out(probabilities, groups=[0, 0, 0, None], capacities={0: 2})
    # Expert 1 prefers token 1, and of the equal tokens 0 and 2 the earlier; token 3 is padding.
    assert pairs == [(0, 0), (0, 1), (1, 1), (2, 0)]


def test_inputs_repeat_and_hold_padding_examples_and_ties() -> None:
    first, second = (RouterInputs.random(200, 3, seed=4) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert 0.7 < first.valid.double().mean() < 0.9
    assert set(first.segments.tolist()) == {2, 7, 40}
    assert len(first.logits.unique()) == 600
    assert set(RouterInputs.random(50, 3, seed=4, ties=True).logits.unique().tolist()) == {0, 1, 2}


def test_a_router_of_logits_returns_what_it_is_given() -> None:
    case = RouterInputs.random(9, 4, seed=1)
    routing = case.route(router_of_logits(SwitchConfig(num_experts=4)))
    assert torch.equal(routing.logits[case.valid], case.logits[case.valid])
