"""Expert choice against the written-out definition: who is taken, how many, with which gate."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.moe.routers import ExpertChoiceConfig
from flanmoe.moe.routing import Routing
from flanmoe.testing.routing import (
    RouterInputs,
    check_routing,
    expert_choice_written_out,
    kept_pairs,
    router_of_logits,
)

FACTORS = st.sampled_from([0.01, 0.5, 1.0, 1.25, 2.0, 100.0])


@st.composite
def inputs(draw: st.DrawFn) -> RouterInputs:
    return RouterInputs.random(
        draw(st.integers(0, 14)),
        draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**31)),
        ties=draw(st.booleans()),
    )


def places_of_each_example(case: RouterInputs, factor: float) -> dict[int, int]:
    """clip(round(factor * T / E), 1, T), T the real tokens of an example."""
    lengths = Counter(group for group in case.example_groups() if group is not None)
    num_experts = case.logits.shape[1]
    return {
        group: min(max(round(Fraction(str(factor)) * length / num_experts), 1), length)
        for group, length in lengths.items()
    }


def route(logits: torch.Tensor, *, factor: float = 1.0, **masks: torch.Tensor) -> Routing:
    config = ExpertChoiceConfig(num_experts=logits.shape[1], capacity_factor=factor)
    return router_of_logits(config)(logits, **masks)


@given(case=inputs(), factor=FACTORS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_definition(training: bool, case: RouterInputs, factor: float) -> None:
    config = ExpertChoiceConfig(num_experts=case.logits.shape[1], capacity_factor=factor)
    routing = case.route(router_of_logits(config).train(training))
    places = places_of_each_example(case, factor)
    check_routing(routing, groups=case.segments.tolist(), capacities=places)
    probabilities = case.probabilities()
    expected = expert_choice_written_out(
        probabilities, groups=case.example_groups(), capacities=places
    )
    assert kept_pairs(routing) == expected
    # The probability over experts, not renormalised over the experts that took the token.
    assert routing.gates.tolist() == pytest.approx([probabilities[t][e] for t, e in expected])


@given(case=inputs(), factor=FACTORS)
def test_tokens_ask_for_nothing_and_none_is_dropped(case: RouterInputs, factor: float) -> None:
    config = ExpertChoiceConfig(num_experts=case.logits.shape[1], capacity_factor=factor)
    router = router_of_logits(config)
    routing = case.route(router)
    assert router.top_k == 0
    assert routing.choices.expert_ids.shape == (len(case.logits), 0)
    assert int(routing.num_dropped) == 0


def test_of_equal_tokens_the_earlier_are_taken() -> None:
    assert kept_pairs(route(torch.zeros(4, 2))) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_probabilities_run_over_experts_and_not_over_tokens() -> None:
    # Token 1 has the larger logit for expert 0, but token 0 is surer of it.
    routing = route(torch.tensor([[2.0, 0.0], [3.0, 2.9]]))
    assert kept_pairs(routing) == [(0, 0), (1, 1)]


def test_one_place_at_least_and_never_more_than_there_are_tokens() -> None:
    logits = torch.randn(3, 8)
    assert route(logits, factor=0.01).expert_counts().tolist() == [1] * 8
    assert route(logits, factor=100.0).expert_counts().tolist() == [3] * 8


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_no_token_and_nothing_but_padding_give_an_empty_list(num_tokens: int) -> None:
    valid = torch.zeros(num_tokens, dtype=torch.bool)
    assert kept_pairs(route(torch.randn(num_tokens, 3), valid=valid)) == []


def test_a_single_token_is_taken_by_every_expert() -> None:
    assert kept_pairs(route(torch.randn(1, 3))) == [(0, 0), (0, 1), (0, 2)]


def test_halves_go_to_the_even_number() -> None:
    # 5 / 2 and 7 / 2 tokens an expert.
    assert route(torch.randn(5, 2)).expert_counts().tolist() == [2, 2]
    assert route(torch.randn(7, 2)).expert_counts().tolist() == [4, 4]


def test_padding_of_every_example_is_kept_apart() -> None:
    valid = torch.tensor([False, True, True, False, True, True])
    segments = torch.tensor([0, 0, 0, 5, 5, 5])
    # Padding has the largest probabilities.
    logits = torch.tensor([[9.0, 0], [1, 0], [0, 1], [0, 9.0], [1, 0], [0, 1]])
    routing = route(logits, valid=valid, segments=segments)
    assert kept_pairs(routing) == [(1, 0), (2, 1), (4, 0), (5, 1)]


def test_the_default_is_two_experts_a_token() -> None:
    routing = router_of_logits(ExpertChoiceConfig(num_experts=4))(torch.randn(16, 4))
    assert routing.expert_counts().tolist() == [8] * 4
