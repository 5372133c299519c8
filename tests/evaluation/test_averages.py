"""Averages over tasks and clusters by hand, and where seen examples go."""

from collections.abc import Callable

import pytest

from flanmoe.core.errors import DataError
from flanmoe.evaluation.averages import average, example_scores, task_score
from flanmoe.evaluation.results import ExampleRecord

Record = Callable[..., ExampleRecord]


def test_pooled_counts_examples_and_macro_counts_tasks(record: Record) -> None:
    records = [record("a", str(key), 1.0, True) for key in range(3)] + [
        record("b", "0", 5.0, False)
    ]
    found = average(records, {"a": "x", "b": "x"})
    assert found.pooled.loss.mean == 2.0
    assert found.pooled.loss.clustered_standard_error is not None
    assert found.macro.loss.mean == 3.0
    assert found.pooled.accuracy is not None
    assert found.pooled.accuracy.mean == 0.75
    assert found.macro.accuracy is not None
    assert found.macro.accuracy.mean == 0.5
    assert found.macro.chance == 0.25
    # Task a is perfect (100), task b is all wrong (-100 / 3).
    assert found.macro.normalised_accuracy == pytest.approx(100 / 3)


def test_clusters_average_over_their_own_tasks(record: Record) -> None:
    records = [record("a", "0", 1.0), record("b", "0", 3.0), record("c", "0", 10.0)]
    found = average(records, {"a": "x", "b": "x", "c": "y"})
    assert {name: score.loss.mean for name, score in found.clusters.items()} == {
        "x": 2.0,
        "y": 10.0,
    }
    assert found.clusters["x"].loss.num_values == 2


def test_tasks_stand_in_the_order_of_the_suite(record: Record) -> None:
    records = [record("b", "0", 1.0), record("a", "0", 1.0)]
    assert [score.task for score in average(records, {"a": "x", "b": "x"}).tasks] == ["a", "b"]


def test_seen_examples_stay_out_of_the_headline(record: Record) -> None:
    records = [record("a", "0", 0.0, seen=True), record("a", "1", 2.0), record("a", "2", 4.0)]
    found = task_score(records, cluster="x")
    assert found.headline.loss.mean == 3.0
    assert found.seen is not None
    assert found.seen.loss.mean == 0.0
    assert (found.num_examples, found.num_seen, found.only_seen) == (3, 1, False)
    assert average(records, {"a": "x"}).pooled.loss.mean == 3.0


def test_a_task_seen_as_a_whole_stays_out_of_the_averages(record: Record) -> None:
    records = [record("a", "0", 0.0, seen=True), record("b", "0", 2.0)]
    found = average(records, {"a": "x", "b": "y"})
    assert found.tasks[0].only_seen
    assert found.tasks[0].headline.loss.mean == 0.0
    assert found.macro.loss.mean == found.pooled.loss.mean == 2.0
    assert list(found.clusters) == ["y"]
    assert not found.only_seen


def test_a_suite_seen_as_a_whole_is_averaged_and_said(record: Record) -> None:
    records = [record("a", "0", 1.0, seen=True), record("b", "0", 3.0, seen=True)]
    found = average(records, {"a": "x", "b": "y"})
    assert found.only_seen
    assert found.macro.loss.mean == found.pooled.loss.mean == 2.0


def test_free_answers_have_no_accuracy_and_do_not_count_in_it(record: Record) -> None:
    free, chosen = record("a", "0", 1.0), record("a", "1", 2.0, True)
    assert example_scores([free]).accuracy is None
    mixed = example_scores([free, chosen])
    assert mixed.accuracy is not None
    assert mixed.accuracy.num_values == 1
    assert mixed.loss.num_values == 2


def test_chance_is_the_mean_over_examples(record: Record) -> None:
    two = record("a", "0", 1.0, True, choice_scores=(-1.0, -2.0))
    four = record("a", "1", 1.0, False)
    assert example_scores([two, four]).chance == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_nothing_has_no_scores() -> None:
    with pytest.raises(DataError, match="found 0"):
        example_scores([])


def test_parts_are_averaged_before_they_count_as_one_task(record: Record) -> None:
    records = [
        record("a", "0", 1.0, True),
        record("b", "0", 3.0, False),
        record("c", "0", 8.0, False),
    ]
    found = average(records, dict.fromkeys("abc", "x"), parts={"a": "whole", "b": "whole"})
    assert found.clusters["x"].accuracy is not None
    assert found.clusters["x"].accuracy.mean == 0.25
    assert found.clusters["x"].accuracy.num_values == 2
    assert found.clusters["x"].loss is not None
    assert found.clusters["x"].loss.mean == 5.0
    assert [task.part_of for task in found.tasks] == ["whole", "whole", None]


def test_a_task_of_one_question_takes_its_error_from_the_others(record: Record) -> None:
    records = [record("a", str(key), 1.0, key == 0) for key in range(2)] + [
        record("b", "0", 1.0, True)
    ]
    found = average(records, {"a": "x", "b": "x"})
    # Task a: variance 1/2 of two values, so 1/4 of their mean; task b: 1/2.
    assert found.macro.accuracy is not None
    assert found.macro.accuracy.standard_error == pytest.approx((1 / 4 + 1 / 2) ** 0.5 / 2)
    assert found.macro.normalised_standard_error == pytest.approx(
        100 / 0.75 * (1 / 4 + 1 / 2) ** 0.5 / 2
    )
    # Its own error stays unknown.
    assert found.tasks[1].headline.accuracy is not None
    assert found.tasks[1].headline.accuracy.standard_error is None


def test_scores_without_losses_and_without_chances(record: Record) -> None:
    plain = [record("a", str(key), None, score=float(key), chance=None) for key in range(2)]
    scores = example_scores(plain)
    assert scores.loss is None
    assert scores.accuracy is not None
    assert scores.accuracy.mean == 0.5
    assert (scores.chance, scores.normalised_accuracy) == (None, None)


def test_answers_that_cannot_be_read_are_counted(record: Record) -> None:
    records = [
        record("a", "0", None, score=0.0, output="Hm.", unfinished=True),
        record("a", "1", None, score=1.0, output="2", extracted="2", truncated=True),
    ]
    found = task_score(records, cluster="x")
    assert (found.num_unreadable, found.num_unfinished, found.num_truncated) == (1, 1, 1)
