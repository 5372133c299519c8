"""Arms side by side: what all have, what is left out and said, and what cannot be compared."""

import math
import re
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import DataError
from flanmoe.study.analysis.observations import Observation, Observations
from flanmoe.study.analysis.pairing import pair

ARMS = {"a": {}, "b": {}}
Table = Callable[..., Observations]


def _rows(arm: str, seed: int, task: str, keys: str, value: float = 1.0) -> list[Observation]:
    return [Observation(arm, seed, task, key, "accuracy", value) for key in keys]


def _all(*rows: list[Observation]) -> Observations:
    return Observations([row for some in rows for row in some], arms=ARMS)


@given(st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(random: Random) -> None:
    rng = np.random.default_rng(5)
    records = [
        Observation(arm, seed, task, key, "accuracy", float(rng.normal()))
        for arm in ARMS
        for seed in (3, 1)
        for task in ("u", "t")
        for key in "zyx"
    ]
    shuffled = list(records)
    random.shuffle(shuffled)
    first, second = (
        pair(Observations(rows, arms=ARMS), "accuracy", ("a", "b")) for rows in (records, shuffled)
    )
    np.testing.assert_array_equal(first.scores, second.scores)
    assert (first.seeds, first.tasks, first.examples) == (
        second.seeds,
        second.tasks,
        second.examples,
    )
    assert first.seeds == (1, 3)
    assert first.examples[:4] == (("t", "x"), ("t", "y"), ("t", "z"), ("u", "x"))


def test_each_score_stands_at_its_place() -> None:
    found = pair(
        _all(
            *(
                _rows(arm, seed, task, "xy", float(value))
                for value, (arm, seed, task) in enumerate(
                    (arm, seed, task) for arm in "ab" for seed in (0, 1) for task in "tu"
                )
            )
        ),
        "accuracy",
        ("a", "b"),
    )
    assert found.scores.tolist() == [
        [[0, 0, 1, 1], [2, 2, 3, 3]],
        [[4, 4, 5, 5], [6, 6, 7, 7]],
    ]
    np.testing.assert_allclose(found.parts({"a": -1, "b": 1}), np.full((2, 4), 4 / 4))


def test_a_seed_that_an_arm_lacks_is_left_out_and_said() -> None:
    rows = [_rows(arm, seed, "t", "xy") for arm in "ab" for seed in (0, 1)]
    found = pair(_all(*rows, _rows("a", 2, "t", "xy")), "accuracy", ("a", "b"))
    assert found.seeds == (0, 1)
    assert found.left_out == ("Seed 2 is left out: arm `b` has no `accuracy` of any task with it.",)


def test_a_seed_without_one_task_is_left_out_and_said() -> None:
    rows = [_rows(arm, seed, task, "xy") for arm in "ab" for seed in (0, 1) for task in "tu"]
    found = pair(_all(*rows[:-1]), "accuracy", ("a", "b"))
    assert found.seeds == (0,)
    assert found.left_out == ("Seed 1 is left out: arm `b` has no `accuracy` of task `u` with it.",)
    assert pair(_all(*rows[:-1]), "accuracy", ("a", "b"), tasks=["t"]).seeds == (0, 1)


def test_an_example_that_a_run_lacks_is_left_out_and_said() -> None:
    found = pair(
        _all(_rows("a", 0, "t", "wxyz"), _rows("b", 0, "t", "xyz")), "accuracy", ("a", "b")
    )
    assert [key for _, key in found.examples] == ["x", "y", "z"]
    assert found.left_out == ("1 of 4 examples of task `t` are left out: not every run has them.",)


def test_no_common_examples_are_refused() -> None:
    message = (
        "The arms `a`, `b` need examples of task `t` in common, but of 4 each is missing somewhere. Evaluate "
        "all arms and seeds with the same suite, limit and data."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        pair(_all(_rows("a", 0, "t", "wx"), _rows("b", 0, "t", "yz")), "accuracy", ("a", "b"))


def test_no_common_seed_is_refused() -> None:
    with pytest.raises(
        DataError, match=re.escape("need a seed with which each has all 1 tasks, but have 0.")
    ):
        pair(_all(_rows("a", 0, "t", "xy"), _rows("b", 1, "t", "xy")), "accuracy", ("a", "b"))


def test_an_arm_without_scores_is_refused(table: Table) -> None:
    message = (
        "Every arm that is compared needs scores of `accuracy`, but arm `c` has 0. Let it finish (`flanmoe run "
        "--resume`), or take it out of the claim."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        pair(table({"a": [1, 0]}, failed=["c"]), "accuracy", ("a", "c"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(table: Table, value: float) -> None:
    message = (
        "Scores must be finite, but 2 of 3 scores of `accuracy` of arm `b` with seed 1 are not. Leaving them "
        "out would favour a run that diverged; find out why it did."
    )
    scores = {"a": np.ones((2, 3)), "b": [[1, 1, 1], [value, 1, value]]}
    with pytest.raises(DataError, match=re.escape(message)):
        pair(table(scores), "accuracy", ("a", "b"))


def test_patterns_choose_tasks(table: Table) -> None:
    scores = {"a": np.ones((1, 6)), "b": np.ones((1, 6))}
    found = table(scores, tasks=["mmlu/x", "mmlu/y", "bbh/z"])
    assert pair(found, "accuracy", ("a", "b"), tasks=["mmlu/*"]).tasks == ("mmlu/x", "mmlu/y")
    message = "Each of `tasks` must name at least one task with scores, but `mmmlu/*` names 0. Known: `bbh/z`"
    with pytest.raises(DataError, match=re.escape(message)):
        pair(found, "accuracy", ("a", "b"), tasks=["mmmlu/*"])
