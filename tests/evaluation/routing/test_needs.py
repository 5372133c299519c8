"""What tasks need, against a search through all subsets and counts by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.evaluation.routing.needs import needed_experts, needs


def fewest(mass: list[int], share: float) -> int:
    """The size of the smallest set of experts that holds the share, by trying all of them."""
    wanted = share * sum(mass)
    return next(
        size
        for size in range(len(mass) + 1)
        if any(sum(some) >= wanted - 1e-6 for some in itertools.combinations(mass, size))
    )


@given(mass=st.lists(st.integers(0, 9), min_size=1, max_size=7), percent=st.integers(1, 100))
def test_no_smaller_set_holds_the_share(mass: list[int], percent: int) -> None:
    found = needed_experts(np.array(mass, dtype=np.float64), percent / 100)
    assert len(set(found)) == len(found) == fewest(mass, percent / 100)
    inside = [mass[expert] for expert in found]
    assert inside == sorted(inside, reverse=True)
    assert sum(inside) >= percent / 100 * sum(mass) - 1e-6


def mass_of(*tasks: list[list[float]]) -> np.ndarray:
    """The gate mass of one layer, task by task and half by half."""
    return np.array(tasks, dtype=np.float64)


def test_numbers_by_hand() -> None:
    first = mass_of([[6, 3, 1, 0], [6, 3, 0, 1]], [[0, 0, 5, 5], [0, 1, 5, 4]])
    second = mass_of([[9, 1, 0, 0], [1, 9, 0, 0]], [[8, 1, 1, 0], [0, 0, 0, 0]])
    found = needs(["a", "b"], [first, second], share=0.9)
    # Of a: 12 and 6 of 20 in the first layer, 10 and 10 of 20 in the second.
    assert found.experts == (((0, 1), (2, 3)), ((0, 1), (0, 1)))
    assert found.numbers == ((2, 2), (2, 2))
    assert found.times_needed(0, 4) == [1, 1, 1, 1]
    assert found.times_needed(1, 4) == [2, 2, 0, 0]
    # Both need 0 and 1 in the second layer: 2 of 4.
    assert (found.overlap[0][1], found.overlap[1][0]) == (0.5, 0.5)
    assert found.alone == (0.5, 0.5)
    # The halves of a need {0, 1}, {0, 1} and {0}, {1}: 2 of 3 in common. Those of b need {2, 3}, {2, 3}
    # (10 of 10, and 9 of 10) and {0, 1}, {}: 2 of 4 one way, 2 of 2 the other.
    assert found.overlap[0][0] == pytest.approx(2 / 3, abs=1e-5)
    assert found.overlap[1][1] == pytest.approx((2 / 4 + 2 / 2) / 2)


def test_one_task_shares_with_nobody() -> None:
    found = needs(["a"], [mass_of([[3, 1], [1, 3]])], share=0.5)
    assert (found.experts, found.alone) == ((((0,),),), (1.0,))
    assert found.overlap == ((0.0,),)


def test_a_half_without_tokens_is_said() -> None:
    found = needs(["a"], [mass_of([[3, 1], [0, 0]])], share=0.9)
    assert found.overlap == ((None,),)
