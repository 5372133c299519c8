"""The table of scores: what it keeps, and what it refuses."""

import re

import pytest

from flanmoe.core.errors import DataError
from flanmoe.study.analysis.observations import Observation, Observations

ARMS = {"dense": {"size": "small"}, "sparse": {"size": "small"}, "failed": {}}


def _row(arm: str = "dense", seed: int = 0, task: str = "t", value: float = 1.0) -> Observation:
    return Observation(arm, seed, task, "e", "accuracy", value)


def test_it_knows_who_measured_what() -> None:
    found = Observations([_row(), _row("sparse", 3, "u", 0.5), _row("sparse", 1, "t")], arms=ARMS)
    assert found.measured() == ("accuracy",)
    assert [found.has("accuracy", arm) for arm in ARMS] == [True, True, False]
    assert found.seeds("accuracy", "sparse") == (1, 3)
    assert found.tasks("accuracy", ["dense", "sparse"]) == ("t", "u")
    assert found.scores("accuracy", "sparse", 3, "u") == {"e": 0.5}
    assert found.scores("accuracy", "failed", 3, "u") == {}
    assert set(found.records()) == {_row(), _row("sparse", 3, "u", 0.5), _row("sparse", 1, "t")}


def test_plain_records_are_read() -> None:
    record = {"arm": "dense", "seed": 0, "task": "t", "example": "e", "metric": "loss", "value": 2}
    assert Observations([Observation(**record)], arms=ARMS).measured() == ("loss",)


def test_a_repeated_seed_is_refused() -> None:
    message = (
        "Every example may have one `accuracy` in each run, but example `e` of task `t` has two in arm `dense` "
        "with seed 0. Was the seed repeated? Give every run a seed of its own."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        Observations([_row(), _row(value=0.0)], arms=ARMS)


def test_an_arm_or_metric_that_is_not_declared_is_refused() -> None:
    message = (
        "A score must belong to one of the arms `dense`, `sparse`, `failed`, but found `spare`. Did you mean "
        "`sparse`? Declare it, or take its scores out."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        Observations([_row("spare")], arms=ARMS)
    with pytest.raises(DataError, match="one of the metrics `loss`"):
        Observations([Observation("dense", 0, "t", "e", "f1", 1.0)], arms=ARMS)
