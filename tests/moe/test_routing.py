"""`Routing`: one row a token, what was dropped, what was asked for, and the refusal of NaN."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import ModelError
from flanmoe.moe.routing import Choices, ForcedRouting, Routing, numbered, require_finite_logits


def routing_of(
    token_ids: list[int],
    expert_ids: list[int],
    gates: list[float],
    *,
    num_tokens: int,
    choices: Choices | None = None,
) -> Routing:
    """Assignments among four experts; without `choices` experts chose."""
    return Routing(
        token_ids=torch.tensor(token_ids, dtype=torch.long),
        expert_ids=torch.tensor(expert_ids, dtype=torch.long),
        gates=torch.tensor(gates, dtype=torch.float64),
        logits=torch.zeros(num_tokens, 4),
        valid=torch.ones(num_tokens, dtype=torch.bool),
        segments=torch.zeros(num_tokens, dtype=torch.long),
        choices=choices or Choices.none(num_tokens, torch.device("cpu")),
    )


# Token 0 keeps both choices, token 1 its second alone, token 2 gave up the second and its first did
# not fit, and token 3 is padding.
ASKED = Choices(
    expert_ids=torch.tensor([[2, 0], [2, 1], [2, 3], [1, 0]]),
    asked=torch.tensor([[True, True], [True, True], [True, False], [False, False]]),
)
SOME_KEPT = routing_of([0, 0, 1], [2, 0, 1], [0.6, 0.3, 0.2], num_tokens=4, choices=ASKED)


def test_slots_are_one_row_a_token() -> None:
    expert_ids, gates = SOME_KEPT.slots()
    assert expert_ids.tolist() == [[2, 0], [1, 4], [4, 4], [4, 4]]
    assert gates.tolist() == [[0.6, 0.3], [0.2, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_slots_follow_the_order_of_the_list_within_a_token() -> None:
    routing = routing_of([2, 0, 2, 0, 2], [3, 1, 0, 2, 1], [0.1, 0.2, 0.3, 0.4, 0.5], num_tokens=3)
    expert_ids, gates = routing.slots()
    assert expert_ids.tolist() == [[1, 2, 4], [4, 4, 4], [3, 0, 1]]
    assert gates.tolist() == [[0.2, 0.4, 0.0], [0.0, 0.0, 0.0], [0.1, 0.3, 0.5]]


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_without_assignments_there_is_no_slot(num_tokens: int) -> None:
    expert_ids, gates = routing_of([], [], [], num_tokens=num_tokens).slots()
    assert expert_ids.shape == gates.shape == (num_tokens, 0)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), unique=True, max_size=15),
    seed=st.integers(0, 1000),
)
def test_slots_hold_every_assignment_and_nothing_else(
    pairs: list[tuple[int, int]], seed: int
) -> None:
    gates = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens, experts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expert_ids, slots = routing_of(tokens, experts, gates, num_tokens=6).slots()
    rows: list[list[tuple[int, float]]] = [[] for _ in range(6)]
    for (token, expert), gate in zip(pairs, torch.tensor(gates).double().tolist(), strict=True):
        rows[token].append((expert, gate))
    width = max(map(len, rows))
    padded = [row + [(4, 0.0)] * (width - len(row)) for row in rows]
    assert [[slot[0] for slot in row] for row in padded] == expert_ids.tolist()
    assert [[slot[1] for slot in row] for row in padded] == [
        pytest.approx(row, rel=1e-6) for row in slots.tolist()
    ]


def test_the_gradient_of_every_gate_comes_back_through_its_slot() -> None:
    gates = torch.tensor([0.5, 0.25, 0.125], requires_grad=True)
    routing = Routing(
        token_ids=torch.tensor([1, 0, 1]),
        expert_ids=torch.tensor([3, 2, 0]),
        gates=gates,
        logits=torch.zeros(2, 4),
        valid=torch.ones(2, dtype=torch.bool),
        segments=torch.zeros(2, dtype=torch.long),
        choices=Choices.none(2, torch.device("cpu")),
    )
    # Rows [[2, -], [3, 0]], each slot with a weight of its own.
    (routing.slots()[1] * torch.tensor([[1.0, 10.0], [100.0, 1000.0]])).sum().backward()
    assert gates.grad.tolist() == [100.0, 1.0, 1000.0]


def test_dropped_is_what_was_asked_for_and_not_kept() -> None:
    # Asked for: 2 + 2 + 1; kept: 3.
    assert int(SOME_KEPT.num_dropped) == 2


def test_where_experts_choose_nothing_is_dropped() -> None:
    assert int(routing_of([0, 0], [1, 2], [0.5, 0.5], num_tokens=3).num_dropped) == 0


def test_load_counts_what_was_kept() -> None:
    assert SOME_KEPT.expert_counts().tolist() == [1, 1, 1, 0]


def test_asked_pairs_hold_what_was_dropped_but_not_what_was_given_up() -> None:
    token_ids, expert_ids = SOME_KEPT.asked_pairs()
    pairs = list(zip(token_ids.tolist(), expert_ids.tolist(), strict=True))
    assert pairs == [(0, 2), (0, 0), (1, 2), (1, 1), (2, 2)]


def test_first_choices_alone() -> None:
    token_ids, expert_ids = SOME_KEPT.asked_pairs(first_only=True)
    assert (token_ids.tolist(), expert_ids.tolist()) == ([0, 1, 2], [2, 2, 2])


def test_every_choice_counts_and_not_only_two() -> None:
    choices = Choices(torch.tensor([[3, 1, 0, 2]]), torch.tensor([[True, True, False, True]]))
    routing = routing_of([0], [3], [1.0], num_tokens=1, choices=choices)
    assert routing.asked_pairs()[1].tolist() == [3, 1, 2]


@pytest.mark.parametrize("first_only", [True, False])
def test_where_experts_choose_nothing_is_asked_for(first_only: bool) -> None:
    routing = routing_of([0], [1], [0.5], num_tokens=2)
    token_ids, expert_ids = routing.asked_pairs(first_only=first_only)
    assert (token_ids.tolist(), expert_ids.tolist()) == ([], [])


def test_what_a_native_router_returns_keeps_all_but_padding() -> None:
    routing = Routing.from_top_k(
        torch.zeros(3, 4),
        torch.tensor([[2, 0], [1, 3], [0, 1]]),
        torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.5, 0.5]]),
        valid=torch.tensor([True, False, True]),
    )
    assert routing.token_ids.tolist() == [0, 0, 2, 2]
    assert routing.expert_ids.tolist() == [2, 0, 0, 1]
    assert routing.gates.tolist() == [0.5, 0.25, 0.5, 0.5]
    assert routing.choices.asked.tolist() == [[True, True], [False, False], [True, True]]
    assert int(routing.num_dropped) == 0
    assert routing.segments.tolist() == [0, 0, 0]


def test_forced_is_the_list_and_what_it_came_from() -> None:
    forced = SOME_KEPT.forced
    assert forced.token_ids is SOME_KEPT.token_ids
    assert forced.expert_ids is SOME_KEPT.expert_ids
    assert forced.choices is SOME_KEPT.choices


def test_forcing_experts_by_hand_drops_nothing() -> None:
    forced = ForcedRouting.of_experts(torch.tensor([[3, 1], [0, 2]]))
    assert forced.token_ids.tolist() == [0, 0, 1, 1]
    assert forced.expert_ids.tolist() == [3, 1, 0, 2]
    assert forced.choices.asked.all()


def test_numbers_without_gaps_in_the_order_of_the_values() -> None:
    assert numbered(torch.tensor([40, 7, 40, -1])).tolist() == [2, 1, 2, 0]


def test_logits_that_are_not_finite_are_counted_and_the_first_named() -> None:
    logits = torch.tensor([[math.nan, 0.0], [0.0, 1.0], [0.0, -math.inf], [math.inf, math.nan]])
    require_finite_logits(logits, torch.tensor([False, True, False, False]), router="gate 3")
    with pytest.raises(ModelError) as caught:
        require_finite_logits(logits, torch.tensor([False, True, True, True]), router="gate 3")
    assert str(caught.value) == (
        "Router logits must be finite, but gate 3 gave NaN or infinity for 2 of 3 tokens, the "
        "first is token 2. Its input has overflowed: lower the learning rate, or go back to the "
        "last checkpoint."
    )
