"""Capacity: rounding in exact arithmetic, groups, and places in a queue."""

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.moe.routers import CapacityConfig
from flanmoe.moe.routers.capacity import Rounding, fitting, places, rounded_share
from flanmoe.testing.routing import token_choice_written_out


def share(num_tokens: int, num_experts: int, factor: float, rounding: Rounding) -> int:
    found = rounded_share(torch.tensor([num_tokens]), num_experts, factor=factor, rounding=rounding)
    return int(found)


# Research note 01, section 6.2: both code bases agree on these.
@pytest.mark.parametrize("rounding", ["nearest", "down"])
@pytest.mark.parametrize(
    ("num_tokens", "factor", "num_experts", "capacity"),
    [
        (4096, 1.25, 64, 80),
        (4096, 2.0, 64, 128),
        (8192, 1.25, 128, 80),
        (1024, 2.0, 16, 128),
        (100, 1.25, 64, 4),
    ],
)
def test_capacities_of_flaxformer_and_mesh_tf(
    num_tokens: int, factor: float, num_experts: int, capacity: int, rounding: Rounding
) -> None:
    config = CapacityConfig(rounding=rounding)
    found = config.capacities(torch.tensor([num_tokens]), num_experts, factor=factor)
    assert found.tolist() == [capacity]


@pytest.mark.parametrize(
    ("num_tokens", "nearest", "down", "up"), [(10, 2, 2, 3), (14, 4, 3, 4), (12, 3, 3, 3)]
)
def test_halves_go_to_the_even_number(num_tokens: int, nearest: int, down: int, up: int) -> None:
    # 2.5, 3.5 and 3 tokens an expert.
    assert share(num_tokens, 4, 1.0, "nearest") == nearest
    assert share(num_tokens, 4, 1.0, "down") == down
    assert share(num_tokens, 4, 1.0, "up") == up


def test_a_factor_is_the_decimal_number_as_written() -> None:
    # 1.1 as a binary number lies a little above 1.1, and 10 of it would be rounded up to 12.
    assert Fraction("1.1") < 1.1
    assert share(10, 1, 1.1, "up") == 11
    # 1.15 lies a little below: 100 of it would be rounded down to 114.
    assert share(100, 1, 1.15, "down") == 115


@given(
    num_tokens=st.integers(0, 2**20),
    num_experts=st.integers(1, 512),
    factor=st.floats(0.001, 16),
)
def test_rounding_is_exact(num_tokens: int, num_experts: int, factor: float) -> None:
    exact = Fraction(str(factor)) * num_tokens / num_experts
    assert 0 <= exact - share(num_tokens, num_experts, factor, "down") < 1
    assert 0 <= share(num_tokens, num_experts, factor, "up") - exact < 1
    nearest = share(num_tokens, num_experts, factor, "nearest")
    assert abs(nearest - exact) < Fraction(1, 2) or (
        abs(nearest - exact) == Fraction(1, 2) and nearest % 2 == 0
    )


def test_a_factor_with_many_digits_does_not_overflow() -> None:
    assert share(60_000, 1, 4 / 3, "nearest") == 80_000
    assert share(60_000, 8, 0.1 + 0.2, "nearest") == 2250


def test_the_minimum_holds_for_every_group_by_itself() -> None:
    config = CapacityConfig(minimum=3)
    found = config.capacities(torch.tensor([0, 8, 16, 40]), 4, factor=1.0)
    assert found.tolist() == [3, 3, 4, 10]


def test_evaluation_has_its_own_factor_and_no_limit_unless_asked() -> None:
    config = CapacityConfig(train=1.0, evaluation=2.0)
    assert (config.factor(training=True), config.factor(training=False)) == (1.0, 2.0)
    default = CapacityConfig()
    assert (default.factor(training=True), default.factor(training=False)) == (1.25, None)


def test_examples_are_groups_whatever_their_numbers() -> None:
    groups = CapacityConfig(group="segment").groups(torch.tensor([7, 7, 2, 40, 2]))
    assert groups.tolist() == [1, 1, 0, 2, 0]


def test_a_batch_is_one_group() -> None:
    assert CapacityConfig().groups(torch.tensor([7, 7, 2])).tolist() == [0, 0, 0]


def test_ten_tokens_in_runs_of_at_most_four() -> None:
    groups = CapacityConfig(group_size=4).groups(torch.zeros(10, dtype=torch.long))
    assert groups.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


@given(num_tokens=st.integers(0, 60), size=st.integers(1, 70))
def test_runs_are_the_fewest_and_as_equal_as_can_be(num_tokens: int, size: int) -> None:
    groups = CapacityConfig(group_size=size).groups(torch.zeros(num_tokens, dtype=torch.long))
    numbers = groups.tolist()
    assert numbers == sorted(numbers)
    lengths = Counter(numbers)
    fewest = next(runs for runs in range(num_tokens + 1) if runs * size >= num_tokens)
    assert sorted(lengths) == list(range(fewest))
    assert max(lengths.values(), default=0) - min(lengths.values(), default=0) <= 1


@given(st.lists(st.integers(0, 4), max_size=20))
def test_a_place_is_the_number_of_equal_entries_before(cells: list[int]) -> None:
    found = places(torch.tensor(cells, dtype=torch.long))
    assert found.tolist() == [cells[:i].count(cell) for i, cell in enumerate(cells)]


@st.composite
def queues(draw: st.DrawFn) -> dict:
    """Choices of up to 12 tokens among up to 5 experts, of any number, in any order."""
    num_tokens, num_experts = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    top_k, num_groups = draw(st.integers(1, num_experts)), draw(st.integers(1, 3))
    experts = st.permutations(range(num_experts)).map(lambda order: list(order[:top_k]))
    flags = st.lists(st.booleans(), min_size=top_k, max_size=top_k)

    def each(values: st.SearchStrategy) -> list:
        return draw(st.lists(values, min_size=num_tokens, max_size=num_tokens))

    return {
        "num_experts": num_experts,
        "top_k": top_k,
        "choices": each(experts),
        "asked": each(flags),
        "groups": each(st.integers(0, num_groups - 1)),
        "capacities": [draw(st.integers(0, 4)) for _ in range(num_groups)],
        "confidence": each(st.sampled_from([0.25, 0.5, 0.75])),
    }


@given(queue=queues())
def test_fitting_equals_the_written_out_queue(queue: dict) -> None:
    shape = (len(queue["choices"]), queue["top_k"])
    confidence = torch.tensor(queue["confidence"])
    kept = fitting(
        torch.tensor(queue["choices"], dtype=torch.long).view(shape),
        torch.tensor(queue["asked"], dtype=torch.bool).view(shape),
        groups=torch.tensor(queue["groups"], dtype=torch.long),
        capacities=torch.tensor(queue["capacities"]),
        order=confidence.argsort(descending=True, stable=True),
        num_experts=queue["num_experts"],
    )
    expected = token_choice_written_out(
        queue["choices"],
        queue["asked"],
        groups=queue["groups"],
        capacities=dict(enumerate(queue["capacities"])),
        confidence=queue["confidence"],
    )
    found = {(token, queue["choices"][token][rank]) for token, rank in kept.nonzero().tolist()}
    assert found == set(expected)
