"""The layout of examples: macro-average weights, and tasks of one example put together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.study.analysis.strata import stratify

sizes = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@given(sizes)
def test_the_weighted_sum_is_the_macro_average(task_sizes: list[int]) -> None:
    rng = np.random.default_rng(sum(task_sizes))
    tasks = [rng.normal(size=size) for size in task_sizes]
    order, strata = stratify(task_sizes)
    assert sorted(order) == list(range(len(tasks)))
    laid_out = np.concatenate([tasks[task] for task in order])
    expected = np.mean([task.mean() for task in tasks])
    np.testing.assert_allclose((laid_out * strata.weights).sum(), expected)


@given(sizes)
def test_every_stratum_has_something_to_draw_from(task_sizes: list[int]) -> None:
    _, strata = stratify(task_sizes)
    assert strata.sizes.sum() == sum(task_sizes)
    assert strata.sizes.min() >= 2 or sum(task_sizes) == 1


def test_single_examples_are_drawn_together() -> None:
    order, strata = stratify([1, 3, 1])
    assert order == (1, 0, 2)
    assert strata.sizes.tolist() == [3, 2]
    order, strata = stratify([4, 1, 2])
    assert order == (0, 2, 1)
    assert strata.sizes.tolist() == [4, 3]
    np.testing.assert_allclose(strata.weights, [1 / 12] * 4 + [1 / 6] * 2 + [1 / 3])
