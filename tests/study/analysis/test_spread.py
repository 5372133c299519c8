"""Variances by source against a written-out analysis of variance, and against the sizes that were drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.study.analysis.spread import degrees_of_sum, spread_of
from flanmoe.study.analysis.strata import stratify


def _written_out(tasks: list[np.ndarray]) -> tuple[float, float, float, float]:
    """Estimate, and variances of seeds, of examples and of both, with loops; tasks of [seeds, examples]."""
    num_seeds, num_tasks = len(tasks[0]), len(tasks)
    runs = [np.mean([task[s].mean() for task in tasks]) for s in range(num_seeds)]
    middle = sum(runs) / num_seeds
    seeds = sum((run - middle) ** 2 for run in runs) / (num_seeds - 1) / num_seeds
    examples = both = 0.0
    for task in tasks:
        size = task.shape[1]
        columns = [task[:, i].mean() for i in range(size)]
        examples += np.var(columns, ddof=1) / size / num_tasks**2
        rest = sum(
            (task[s, i] - task[s].mean() - columns[i] + task.mean()) ** 2
            for s in range(num_seeds)
            for i in range(size)
        )
        both += rest / (num_seeds - 1) / (size - 1) / (num_seeds * size) / num_tasks**2
    return middle, seeds, examples, both


@given(st.integers(2, 4), st.lists(st.integers(2, 5), min_size=1, max_size=4), st.integers(0, 999))
def test_equals_the_written_out_analysis(num_seeds: int, sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tasks = [rng.normal(size=(num_seeds, size)) for size in sizes]
    order, strata = stratify(sizes)
    parts = np.concatenate([tasks[task] for task in order], axis=1) * strata.weights
    found = spread_of(parts, strata)
    expected = _written_out(tasks)
    np.testing.assert_allclose(
        [found.mean, found.seeds, found.examples, found.interaction], expected, rtol=1e-9
    )
    assert found.standard_error == pytest.approx((expected[1] + expected[2]) ** 0.5)


def test_many_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(0)
    _, strata = stratify([3, 4])
    parts = rng.normal(size=(5, 3, 7))
    together = spread_of(parts, strata)
    for place in range(5):
        alone = spread_of(parts[place], strata)
        np.testing.assert_allclose(together.degrees[place], alone.degrees)
        np.testing.assert_allclose(together.interaction[place], alone.interaction)


def test_the_sources_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    _, strata = stratify([20, 20])
    seeds, examples, rest = 0.5, 2.0, 1.0
    values = (
        seeds * rng.normal(size=(3000, 4, 1))
        + examples * rng.normal(size=(3000, 1, 40))
        + rest * rng.normal(size=(3000, 4, 40))
    )
    found = spread_of(values * strata.weights, strata)
    both = rest**2 / (4 * 40)
    assert found.interaction.mean() == pytest.approx(both, rel=0.01)
    assert found.seeds.mean() == pytest.approx(seeds**2 / 4 + both, rel=0.05)
    assert found.examples.mean() == pytest.approx(examples**2 / 40 + both, rel=0.02)


def test_degrees_of_freedom_by_hand() -> None:
    assert degrees_of_sum((1.0, 0.0), (2, 50)) == pytest.approx(2)
    assert degrees_of_sum((0.0, 3.0), (2, 50)) == pytest.approx(50)
    assert degrees_of_sum((1.0, 1.0), (2, 2)) == pytest.approx(4)
    assert degrees_of_sum((0.0, 0.0), (2, 50)) == 1


def test_one_seed_has_the_spread_of_examples_alone() -> None:
    _, strata = stratify([4])
    found = spread_of(np.asarray([[1.0, 2.0, 3.0, 4.0]]) * strata.weights, strata)
    assert found.seeds == found.interaction == 0
    assert found.standard_error == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert found.degrees == pytest.approx(3)
