"""What claims are judged on: which answers count, under which names, and what arms cost."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from flanmoe.core.ledger import Ledger
from flanmoe.evaluation.results import ExampleRecord
from flanmoe.study.arm_report import Flops, Parameters
from flanmoe.study.observed import Results, arm_costs, observe, task_of
from flanmoe.study.study import Study

EVALUATE = {"stage": "evaluate", "tasks": ["exemplars/bbh/navigate"]}


def study_of(**arms: dict[str, Any]) -> Study:
    """A study of arms that are only scored."""
    return Study.parse(
        {
            "name": "s",
            "arms": {
                name: {"model": "m", "stages": [EVALUATE], **arm} for name, arm in arms.items()
            },
        }
    )


@dataclass
class Scored:
    """A result of an evaluation, as far as it is looked at."""

    examples: tuple[ExampleRecord, ...]


@dataclass
class Trained:
    """A stage that trained."""

    ledger: Ledger

    @property
    def training(self) -> "Trained":
        """Where its ledger stands."""
        return self


@dataclass
class Left:
    """What an arm left with one seed, as far as it is looked at."""

    seed: int
    last: Scored | None
    pretrainings: dict[str, Trained] = field(default_factory=dict)
    tunings: dict[str, Trained] = field(default_factory=dict)
    active: int = 5

    @property
    def flops(self) -> Flops:
        """Seven for each active parameter."""
        return Flops(body=7.0 * self.active, head=0.0, attention_scores=0.0, context_length=1)

    @property
    def parameters(self) -> Parameters:
        """Twice as many as are active."""
        return Parameters(total=2 * self.active, active=self.active, trainable=0)


def record(task: str, key: str, **values: Any) -> ExampleRecord:
    """An answer."""
    return ExampleRecord(task=task, key=key, content_hash="", prompt_hash="", **values)


def results(**arms: list[Left]) -> Results:
    """Results by arm."""
    return cast(Results, arms)


def test_an_answer_has_a_loss_a_score_and_one_above_chance() -> None:
    answers = (
        record("t", "a", loss=1.5, score=1.0, chance=0.25),
        record("t", "b", loss=2.5, score=1.0, chance=0.25),
    )
    found = observe(study_of(x={}), results(x=[Left(3, Scored(answers))])).observations
    assert found.scores("loss", "x", 3, "t") == {"a": 1.5, "b": 2.5}
    assert found.scores("accuracy", "x", 3, "t") == {"a": 1.0, "b": 1.0}
    assert found.scores("normalised_accuracy", "x", 3, "t") == {"a": 100.0, "b": 100.0}


def test_what_was_trained_on_does_not_count() -> None:
    answers = (record("t", "a", loss=1.0), record("t", "b", loss=9.0, seen=True))
    found = observe(study_of(x={}), results(x=[Left(0, Scored(answers))])).observations
    assert found.scores("loss", "x", 0, "t") == {"a": 1.0}


def test_a_task_is_the_same_in_every_prompt_format_unless_an_arm_asks_it_in_two() -> None:
    one = Left(0, Scored((record("t:test@name", "a", loss=1.0),)))
    two = Left(0, Scored((record("t:test@name", "a", loss=2.0), record("t:test", "a", loss=3.0))))
    found = observe(study_of(x={}, y={}), results(x=[one], y=[two])).observations
    assert found.scores("loss", "x", 0, "t:test") == {"a": 1.0}
    assert found.scores("loss", "y", 0, "t:test@name") == {"a": 2.0}
    assert found.scores("loss", "y", 0, "t:test") == {"a": 3.0}
    assert task_of("a[b]:c@d") == "a[b]:c"


def test_scores_of_parts_are_those_of_one_arm() -> None:
    study = study_of(one={"part_of": "both"}, two={"part_of": "both"}, other={})
    left = results(
        one=[Left(0, Scored((record("t", "a", loss=1.0),)))],
        two=[Left(0, Scored((record("u", "a", loss=2.0),)))],
    )
    found = observe(study, left).observations
    assert found.scores("loss", "both", 0, "t") == {"a": 1.0}
    assert found.scores("loss", "both", 0, "u") == {"a": 2.0}
    # An arm without results is known to be missing.
    assert list(found.arms) == ["both", "other"]
    assert not found.has("loss", "other")


def test_accuracy_counts_where_an_arm_is_above_chance() -> None:
    def arm(right: dict[str, int]) -> list[Left]:
        answers = tuple(
            record(task, str(place), loss=1.0, score=float(place < number), chance=0.5)
            for task, number in right.items()
            for place in range(20)
        )
        return [Left(0, Scored(answers))]

    left = results(x=arm({"guessed": 11, "known": 10}), y=arm({"guessed": 8, "known": 18}))
    found = observe(study_of(x={}, y={}), left)
    assert found.at_chance == ("guessed",)
    assert found.observations.tasks("accuracy", ["x", "y"]) == ("known",)
    assert found.observations.tasks("loss", ["x", "y"]) == ("guessed", "known")
    assert "Accuracy on `guessed` does not count" in found.notes[0]


def test_costs_are_means_over_parts_and_seeds_of_all_training() -> None:
    def trained(tokens: int, flops: float) -> Trained:
        return Trained(Ledger(real_tokens=tokens, flops=flops))

    study = study_of(one={"part_of": "both"}, two={"part_of": "both"}, none={})
    left = results(
        one=[Left(0, None, {"p": trained(10, 100.0)}, {"t": trained(4, 40.0)}, active=5)],
        two=[Left(0, None, {"p": trained(10, 100.0)}, {"t": trained(8, 80.0)}, active=7)],
    )
    costs = arm_costs(study, left)
    assert list(costs) == ["both"]
    found = costs["both"]
    assert (found.tokens, found.training_flops) == (16.0, 160.0)
    assert found.active_parameters == 6.0
    assert found.flops_per_token == pytest.approx(42.0)
