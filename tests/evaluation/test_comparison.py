"""Paired differences against hand-computed values and scipy; refusals; planted differences."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flanmoe.core.errors import DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.comparison import (
    bootstrap_interval,
    compare,
    compare_files,
    mcnemar,
    paired,
)
from flanmoe.evaluation.paired import weighted_difference
from flanmoe.evaluation.results import ExampleRecord, SuiteResult, write_result

Record = Callable[..., ExampleRecord]
Result = Callable[..., SuiteResult]

SEEDS = SeedTree(7)

losses = st.floats(min_value=0, max_value=10, allow_nan=False)
outcomes = st.lists(
    st.tuples(st.sampled_from("abc"), losses, losses, st.booleans(), st.booleans()),
    min_size=1,
    max_size=12,
)


def _both(
    rows: list[tuple[str, float, float, bool, bool]], record: Record, result: Result
) -> tuple[SuiteResult, SuiteResult]:
    first = [record(row[0], str(index), row[1], row[3]) for index, row in enumerate(rows)]
    second = [record(row[0], str(index), row[2], row[4]) for index, row in enumerate(rows)]
    return result(first), result(second)


@pytest.fixture(scope="module")
def four(record: Record, result: Result) -> tuple[SuiteResult, SuiteResult]:
    """Loss differences -1, -1, 0, -2 and accuracy differences +1, +1, 0, -1 over two tasks."""
    rows = [
        ("a", 2.0, 1.0, False, True),
        ("a", 3.0, 2.0, False, True),
        ("b", 1.0, 1.0, True, True),
        ("b", 5.0, 3.0, True, False),
    ]
    return _both(rows, record, result)


def test_differences_by_hand(four: tuple[SuiteResult, SuiteResult]) -> None:
    found = compare(*four, seeds=SEEDS)
    loss = found.pooled.loss
    assert loss is not None
    assert loss.difference.mean == -1.0
    assert loss.difference.standard_error == pytest.approx(np.sqrt(2 / 3) / 2)
    # Cluster sums of the deviations (0, 0 | 1, -1) are 0 and 0.
    assert loss.difference.clustered_standard_error == 0.0
    accuracy = found.pooled.accuracy
    assert accuracy is not None
    assert accuracy.difference.mean == 0.25
    # Deviations 0.75 0.75 | -0.25 -1.25: sums 1.5 and -1.5.
    assert accuracy.difference.clustered_standard_error == pytest.approx(np.sqrt(4.5 * 2) / 4)
    assert found.macro_accuracy is not None
    assert found.macro_accuracy.difference.mean == pytest.approx((1.0 - 0.5) / 2)
    assert found.tasks["b"].loss is not None
    assert found.tasks["b"].loss.difference.mean == -1.0
    assert found.num_examples == 4
    assert found.same_prompts


def test_the_paired_test_equals_scipy(record: Record, result: Result) -> None:
    rng = np.random.default_rng(0)
    rows = [("a", float(x), float(x + d), True, True) for x, d in rng.normal(size=(30, 2))]
    loss = compare(*_both(rows, record, result), seeds=SEEDS).pooled.loss
    assert loss is not None
    assert loss.difference.standard_error is not None
    statistic = loss.difference.mean / loss.difference.standard_error
    expected = stats.ttest_rel([row[2] for row in rows], [row[1] for row in rows]).statistic
    assert statistic == pytest.approx(expected)


@given(outcomes)
def test_exchanging_the_results_changes_the_sign(
    record: Record, result: Result, rows: list[tuple[str, float, float, bool, bool]]
) -> None:
    first, second = _both(rows, record, result)
    there, back = compare(first, second, seeds=SEEDS), compare(second, first, seeds=SEEDS)
    for one, other in (
        (there.pooled.loss, back.pooled.loss),
        (there.pooled.accuracy, back.pooled.accuracy),
        (there.macro_loss, back.macro_loss),
        (there.macro_accuracy, back.macro_accuracy),
    ):
        assert one is not None
        assert other is not None
        assert one.difference.mean == pytest.approx(-other.difference.mean, abs=1e-12)
        assert one.difference.standard_error == pytest.approx(other.difference.standard_error)
        if one.interval is not None and other.interval is not None:
            # The draws are the same, so the interval is mirrored,
            # up to interpolation of percentiles.
            assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=1e-6)
    assert there.pooled.mcnemar is not None
    assert back.pooled.mcnemar is not None
    assert there.pooled.mcnemar.p_value == pytest.approx(back.pooled.mcnemar.p_value)
    assert there.pooled.mcnemar.only_first == back.pooled.mcnemar.only_second


@given(outcomes)
def test_a_result_does_not_differ_from_itself(
    record: Record, result: Result, rows: list[tuple[str, float, float, bool, bool]]
) -> None:
    first, _ = _both(rows, record, result)
    found = compare(first, first, seeds=SEEDS)
    assert found.pooled.loss is not None
    assert found.pooled.loss.difference.mean == 0
    assert found.pooled.mcnemar is not None
    assert found.pooled.mcnemar.p_value == 1.0


@given(st.integers(min_value=0, max_value=12), st.integers(min_value=0, max_value=12))
def test_mcnemar_equals_the_written_out_sum(
    record: Record, only_first: int, only_second: int
) -> None:
    pairs = [
        (record("a", str(index), 1.0, first), record("a", str(index), 1.0, not first))
        for index, first in enumerate([True] * only_first + [False] * only_second)
    ]
    pairs.append((record("a", "both", 1.0, True), record("a", "both", 1.0, True)))
    found = mcnemar(pairs)
    assert found is not None
    assert (found.only_first, found.only_second) == (only_first, only_second)
    total = only_first + only_second
    tail = stats.binom.cdf(min(only_first, only_second), total, 0.5)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))


def test_without_choices_there_is_no_accuracy(record: Record, result: Result) -> None:
    first, second = (result([record("a", str(key), 1.0 + key) for key in range(3)]) for _ in "ab")
    found = compare(first, second, seeds=SEEDS)
    assert found.pooled.accuracy is None
    assert found.pooled.mcnemar is None
    assert found.macro_accuracy is None


def test_losses_over_other_tokens_are_not_compared(record: Record, result: Result) -> None:
    first = result([record("a", "0", 1.0, True), record("b", "0", 1.0, True)])
    second = result([record("a", "0", 2.0, True), record("b", "0", 2.0, True, num_tokens=5)])
    found = compare(first, second, seeds=SEEDS)
    assert found.pooled.loss is None
    assert found.macro_loss is None
    assert found.pooled.accuracy is not None


def test_other_prompts_are_said(record: Record, result: Result) -> None:
    first = result([record("a", "0", 1.0)])
    second = result([record("a", "0", 1.0).model_copy(update={"prompt_hash": "other"})])
    assert not compare(first, second, seeds=SEEDS).same_prompts


def test_examples_seen_by_either_are_left_out(record: Record, result: Result) -> None:
    first = result([record("a", "0", 1.0, seen=True), record("a", "1", 1.0), record("a", "2", 1.0)])
    second = result(
        [record("a", "0", 9.0), record("a", "1", 2.0), record("a", "2", 9.0, seen=True)]
    )
    found = compare(first, second, seeds=SEEDS)
    assert found.pooled.num_examples == 1
    assert found.pooled.loss is not None
    assert found.pooled.loss.difference.mean == 1.0
    assert (found.num_examples, found.num_seen, found.only_seen) == (3, 2, False)


def test_only_seen_examples_are_compared_and_said(record: Record, result: Result) -> None:
    both = [record("a", "0", 1.0, seen=True), record("a", "1", 1.0, seen=True)]
    found = compare(result(both), result(both), seeds=SEEDS)
    assert found.only_seen
    assert found.pooled.num_examples == 2


def test_different_examples_are_refused(record: Record, result: Result) -> None:
    first = result([record("a", str(key), 1.0) for key in range(5)])
    second = result([record("a", str(key), 1.0) for key in range(3, 6)])
    with pytest.raises(DataError) as error:
        compare(first, second, seeds=SEEDS)
    assert str(error.value) == (
        "Two results can be compared over the same examples only, but 3 of 5 are only in the first and "
        "1 of 3 only in the second. Evaluate both models with the same suite, limit, seed and data."
    )


def test_no_examples_are_refused(record: Record, result: Result) -> None:
    empty = result([record("a", "0", 1.0)]).summary()
    with pytest.raises(DataError, match="but both have 0"):
        compare(empty, empty, seeds=SEEDS)


def test_equal_examples_are_paired_by_their_turn(record: Record) -> None:
    first = [record("a", "0", 1.0), record("a", "0", 2.0)]
    second = [record("a", "0", 3.0), record("a", "0", 4.0)]
    assert [(one.loss, other.loss) for one, other in paired(first, second)] == [(1, 3), (2, 4)]
    with pytest.raises(DataError, match="1 of 2 are only in the first"):
        paired(first, second[:1])


def test_order_does_not_matter(four: tuple[SuiteResult, SuiteResult]) -> None:
    first, second = four
    turned = second.model_copy(update={"examples": second.examples[::-1]})
    assert compare(first, turned, seeds=SEEDS) == compare(first, second, seeds=SEEDS)


def test_interval_is_the_same_for_the_same_seed_and_close_to_the_normal_one() -> None:
    sample = np.random.default_rng(1).normal(0.3, 1.0, size=400)
    found = bootstrap_interval([sample.tolist()], seeds=SEEDS)
    assert found == bootstrap_interval([sample.tolist()], seeds=SEEDS)
    assert found is not None
    half = 1.96 * sample.std(ddof=1) / 20
    assert found == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.02)


def test_interval_draws_each_task_by_itself() -> None:
    # Two tasks far apart, each without spread: drawn together, the mean would move.
    assert bootstrap_interval([[0.0] * 5, [10.0] * 5], seeds=SEEDS) == (5.0, 5.0)
    low, high = bootstrap_interval([[0.0, 1.0] * 3, [10.0] * 5], seeds=SEEDS) or (0, 0)
    assert 5.0 <= low < 5.25 < high <= 5.5


def test_interval_needs_two_values_everywhere() -> None:
    assert bootstrap_interval([[1.0, 2.0], [3.0]], seeds=SEEDS) is None


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(40):
        sample = rng.normal(size=60).tolist()
        low, high = bootstrap_interval([sample], seeds=SEEDS.child("trial", trial)) or (1, 1)
        covered += low <= 0 <= high
    assert 33 <= covered <= 40


def test_written_results_compare_alike(
    four: tuple[SuiteResult, SuiteResult], tmp_path: Path
) -> None:
    first, second = four
    write_result(first, tmp_path / "first")
    scores = write_result(second, tmp_path / "second")
    assert compare_files(tmp_path / "first", scores, seed=7) == compare(first, second, seeds=SEEDS)


def test_a_weighted_difference_by_hand(record: Record) -> None:
    def pairs(task: str, *scores: tuple[float, float]) -> list[tuple[ExampleRecord, ExampleRecord]]:
        return [
            (record(task, str(key), None, score=one), record(task, str(key), None, score=other))
            for key, (one, other) in enumerate(scores)
        ]

    own = {"a": pairs("a", (0, 1), (1, 1)), "b": pairs("b", (1, 0), (0, 0), (0, 0), (0, 1))}
    found = weighted_difference(own, {"a": 0.5, "b": 2.0}, seeds=SeedTree(0))
    # Means 1/2 and 0; variances 1/2 over 2 and 2/3 over 4.
    assert found.difference.mean == pytest.approx(0.25)
    expected = math.sqrt(0.25 * (1 / 2) / 2 + 4 * (2 / 3) / 4)
    assert found.difference.standard_error == pytest.approx(expected)
    assert found.interval is not None
    low, high = found.interval
    assert low < 0.25 < high
    # About the normal one.
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.3)


def test_tasks_of_one_question_are_drawn_anew_together(record: Record) -> None:
    own = {
        str(task): [
            (
                record(str(task), "0", None, score=0.0),
                record(str(task), "0", None, score=float(task % 2)),
            )
        ]
        for task in range(20)
    }
    found = weighted_difference(own, dict.fromkeys(own, 1 / 20), seeds=SeedTree(0))
    assert found.difference.mean == pytest.approx(0.5)
    # Nothing is known within a task, so the error is not; the interval is that of twenty draws.
    assert found.difference.standard_error is None
    assert found.interval is not None
    spread = 1.96 * math.sqrt(0.25 / 20)
    assert found.interval == pytest.approx((0.5 - spread, 0.5 + spread), abs=0.06)
