"""Means, standard errors and normalised scores against numpy and written-out formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import DataError
from flanmoe.evaluation.metrics import (
    Estimate,
    chance_normalised,
    estimate_mean,
    macro_average,
    normalised_average,
    with_pooled_errors,
)

values = st.floats(min_value=-1e3, max_value=1e3, allow_nan=False)


@given(st.lists(values, min_size=2, max_size=40))
def test_mean_and_error_equal_numpy(sample: list[float]) -> None:
    found = estimate_mean(sample)
    assert found.mean == pytest.approx(np.mean(sample), rel=1e-12, abs=1e-12)
    expected = np.std(sample, ddof=1) / np.sqrt(len(sample))
    assert found.standard_error == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.num_values == len(sample)
    assert found.clustered_standard_error is None


@given(st.lists(values, min_size=2, max_size=20))
def test_one_cluster_per_value_gives_the_usual_error(sample: list[float]) -> None:
    found = estimate_mean(sample, clusters=range(len(sample)))
    assert found.clustered_standard_error == pytest.approx(found.standard_error, rel=1e-9, abs=1e-9)


@given(st.lists(values, min_size=2, max_size=10), st.integers(min_value=2, max_value=5))
def test_repeating_every_example_within_its_cluster_adds_no_information(
    sample: list[float], copies: int
) -> None:
    once = estimate_mean(sample)
    repeated = estimate_mean(
        [value for value in sample for _ in range(copies)],
        clusters=[index for index in range(len(sample)) for _ in range(copies)],
    )
    assert repeated.clustered_standard_error == pytest.approx(
        once.standard_error, rel=1e-9, abs=1e-9
    )


def test_clustered_error_by_hand() -> None:
    # Mean 2. Deviations -2 0 | 1 1; cluster sums -2 and 2; sqrt((4 + 4) * 2 / 1) / 4 = 1.
    found = estimate_mean([0.0, 2.0, 3.0, 3.0], clusters=["a", "a", "b", "b"])
    assert found.clustered_standard_error == pytest.approx(1.0)


def test_what_cannot_be_known_is_none() -> None:
    assert estimate_mean([3.0]) == Estimate(mean=3.0, standard_error=None, num_values=1)
    assert estimate_mean([3.0, 4.0], clusters=["a", "a"]).clustered_standard_error is None


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="A mean needs at least one value, but found 0"):
        estimate_mean([])


def test_clusters_must_fit() -> None:
    with pytest.raises(ValueError, match=r"one cluster per value \(2\), but has 1"):
        estimate_mean([1.0, 2.0], clusters=["a"])


@given(st.lists(st.lists(values, min_size=2, max_size=8), min_size=2, max_size=6))
def test_macro_average_equals_the_written_out_formula(samples: list[list[float]]) -> None:
    found = macro_average([estimate_mean(sample) for sample in samples])
    means = [np.mean(sample) for sample in samples]
    errors = [np.std(sample, ddof=1) / math.sqrt(len(sample)) for sample in samples]
    assert found.mean == pytest.approx(np.mean(means), rel=1e-12, abs=1e-9)
    assert found.standard_error == pytest.approx(
        math.sqrt(sum(error**2 for error in errors)) / len(samples), rel=1e-9, abs=1e-9
    )
    assert found.clustered_standard_error == pytest.approx(
        np.std(means, ddof=1) / math.sqrt(len(means)), rel=1e-9, abs=1e-9
    )


def test_macro_average_counts_tasks_not_examples() -> None:
    large = estimate_mean([1.0] * 99 + [1.0])
    small = estimate_mean([0.0, 0.0])
    assert macro_average([large, small]).mean == 0.5


def test_macro_average_has_no_error_where_a_task_has_none() -> None:
    found = macro_average([estimate_mean([1.0]), estimate_mean([0.0, 2.0])])
    assert found.standard_error is None
    assert found.clustered_standard_error == 0.0


@pytest.mark.parametrize(
    ("score", "chance", "expected"),
    [(25, 25, 0), (100, 25, 100), (62.5, 25, 50), (0, 25, -100 / 3), (40, 0, 40)],
)
def test_normalised_score(score: float, chance: float, expected: float) -> None:
    assert chance_normalised(score, chance) == pytest.approx(expected)


def test_certain_guessing_is_refused() -> None:
    with pytest.raises(DataError, match="must be below 100 percent, but is 100"):
        chance_normalised(100, 100)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=5), min_size=1, max_size=5))
def test_pooled_errors_equal_the_written_out_formula(samples: list[list[float]]) -> None:
    found = with_pooled_errors([estimate_mean(sample) for sample in samples])
    squares = sum(
        (value - np.mean(sample)) ** 2 for sample in samples for value in sample if len(sample) > 1
    )
    degrees = sum(len(sample) - 1 for sample in samples)
    for sample, estimate in zip(samples, found, strict=True):
        if len(sample) > 1:
            assert estimate == estimate_mean(sample)
        elif degrees:
            expected = math.sqrt(squares / degrees)
            assert estimate.standard_error == pytest.approx(expected, abs=1e-7)
        else:
            assert estimate.standard_error is None


def test_a_normalised_average_by_hand() -> None:
    # (62.5 - 25) / 75 = 50 %, and 30 %.
    assert normalised_average([62.5, 30.0], [25.0, 0.0]) == pytest.approx(40)
    with pytest.raises(ValueError, match="shorter"):
        normalised_average([1.0, 2.0], [0.0])
