"""Choosing experts for a task, against all subsets tried one by one, and on cases done by hand."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import ModelError
from flanmoe.moe.routing import Routing
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.tuners.expert_selection import (
    ExpertSelection,
    expert_shares,
    largest_number,
    ranks_of,
    select_experts,
    smallest_set,
)


def sums_of(assignments: list[list[int]], gate_mass: list[list[float]]) -> RoutingSums:
    """Sums of groups with so many assignments to each expert, and so much gate."""
    none = RoutingSums.none(len(assignments), len(assignments[0]))
    counts = torch.tensor(assignments)
    return dataclasses.replace(
        none,
        tokens=counts.sum(dim=1),
        assignments=counts,
        gate_mass=torch.tensor(gate_mass, dtype=torch.float64),
    )


def counted(
    logits: torch.Tensor, expert_ids: torch.Tensor, gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's scores (equations 7 and 8), token after token: mean gate, mean share of choices."""
    num_tokens, top_k = expert_ids.shape
    gate, token = torch.zeros(2, logits.shape[1], dtype=torch.float64)
    for row in range(num_tokens):
        for choice in range(top_k):
            expert = int(expert_ids[row, choice])
            gate[expert] += float(gates[row, choice]) / num_tokens
            token[expert] += 1 / top_k / num_tokens
    return gate / gate.sum(), token / token.sum()


@given(seed=st.integers(0, 2**32 - 1), num_experts=st.integers(2, 9), tokens=st.integers(1, 30))
def test_shares_are_the_papers_scores_normalised_over_experts(
    seed: int, num_experts: int, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=generator)
    gates, expert_ids = logits.softmax(dim=1).topk(2)
    sums = RoutingSums.of(Routing.from_top_k(logits, expert_ids, gates))
    gate, token = counted(logits, expert_ids, gates)
    torch.testing.assert_close(expert_shares(sums, "gate"), gate, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(expert_shares(sums, "token"), token)


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=7).filter(any),
    percent=st.integers(1, 100),
)
def test_no_smaller_set_of_experts_reaches_the_threshold(counts: list[int], percent: int) -> None:
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    chosen = smallest_set(shares, percent / 100)
    experts = range(len(counts))
    # In whole numbers, without rounding.
    reaching = [
        subset
        for number in range(1, len(counts) + 1)
        for subset in itertools.combinations(experts, number)
        if 100 * sum(counts[expert] for expert in subset) >= percent * sum(counts)
    ]
    assert len(chosen) == min(map(len, reaching))
    assert chosen in reaching
    # Of the sets of that size none has more of the score.
    best = max(sum(counts[e] for e in s) for s in reaching if len(s) == len(chosen))
    assert sum(counts[expert] for expert in chosen) == best
    assert len(chosen) <= largest_number(len(counts), percent / 100)


def test_rounding_takes_no_expert_more() -> None:
    # Seven tenths of ten equal shares add up to a little less than 0.7.
    assert smallest_set(torch.full((10,), 0.1, dtype=torch.float64), 0.7) == tuple(range(7))
    assert largest_number(10, 0.7) == 7


@pytest.mark.parametrize(
    ("num_experts", "threshold", "expected"), [(64, 0.1, 7), (8, 0.2, 2), (8, 0.01, 1), (4, 1.0, 4)]
)
def test_the_most_experts_that_can_be_chosen(
    num_experts: int, threshold: float, expected: int
) -> None:
    assert largest_number(num_experts, threshold) == expected
    even = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    assert len(smallest_set(even, threshold)) == expected


def test_layers_and_scores_are_chosen_for_by_themselves() -> None:
    sums = {
        # Expert 1 is chosen most, expert 2 with the largest gates.
        "one": sums_of([[1, 5, 2, 0]], [[0.5, 1.0, 1.5, 0.0]]),
        "two": sums_of([[4, 0, 0, 4]], [[2.0, 0.0, 0.0, 2.0]]),
    }
    by_token = select_experts(sums, score="token", threshold=0.6)
    assert by_token.experts == {"one": (1,), "two": (0, 3)}
    by_gate = select_experts(sums, score="gate", threshold=0.5)
    # Of equal shares that of the lower number comes first.
    assert by_gate.experts == {"one": (2,), "two": (0,)}
    assert by_gate.num_chosen == 2


def test_groups_are_taken_together() -> None:
    sums = sums_of([[3, 0], [0, 4]], [[3.0, 0.0], [0.0, 1.0]])
    assert expert_shares(sums, "token").tolist() == pytest.approx([3 / 7, 4 / 7])
    assert expert_shares(sums, "gate").tolist() == pytest.approx([3 / 4, 1 / 4])


def test_without_tokens_nothing_is_chosen() -> None:
    with pytest.raises(ModelError) as error:
        select_experts({"one": RoutingSums.none(2, 4)}, score="gate", threshold=0.1)
    assert str(error.value) == (
        "Experts are chosen by what at least 1 token does, but 0 tokens have a `gate` score of 0 together. "
        "Gather statistics on data of the task."
    )


def test_ranks_follow_a_selection() -> None:
    selection = ExpertSelection(experts={"one": (1, 3), "two": (0,)})
    ranks = ranks_of(selection, {"one": 4, "two": 2}, rank=8, elsewhere=1)
    assert ranks == {"one": (1, 8, 1, 8), "two": (8, 1)}
