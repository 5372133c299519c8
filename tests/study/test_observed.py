"""What claims are judged on: which answers count, under which names, and what arms cost."""

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from flanmoe.core.ledger import Ledger
from flanmoe.evaluation.results import ExampleRecord
from flanmoe.study.arm_report import Flops, Parameters
from flanmoe.study.observed import Results, arm_costs, complete, observe
from flanmoe.study.study import Study

EVALUATE = {"stage": "evaluate", "tasks": ["exemplars/bbh/navigate"]}


PART = {"part_of": "both"}
OTHER_PART = {
    "part_of": "both",
    "stages": [{"stage": "evaluate", "tasks": ["exemplars/bbh/snarks"]}],
}


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


def test_scores_of_parts_are_those_of_one_arm() -> None:
    study = study_of(one=PART, two=OTHER_PART, other={})
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
            record(
                task, str(place), loss=1.0, score=float(place < number), chance=0.5, label=place % 2
            )
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


def test_always_giving_the_commonest_answer_is_no_better_than_chance() -> None:
    # Eight of ten questions have the first of four answers.
    def arm(right: set[int]) -> list[Left]:
        answers = tuple(
            record(
                "t", str(place), score=float(place in right), chance=0.25, label=int(place >= 16)
            )
            for place in range(20)
        )
        return [Left(0, Scored(answers))]

    assert observe(study_of(x={}), results(x=arm(set(range(16))))).at_chance == ("t",)
    assert observe(study_of(x={}), results(x=arm(set(range(20))))).at_chance == ()


def test_seeds_that_answer_the_same_questions_are_no_more_questions() -> None:
    def arm(num_seeds: int) -> list[Left]:
        answers = tuple(
            record("t", str(place), score=float(place < 14), chance=0.5, label=place % 2)
            for place in range(20)
        )
        return [Left(seed, Scored(answers)) for seed in range(num_seeds)]

    # 14 of 20 is 1.95 standard errors above a half, however often it is said.
    for num_seeds in (1, 9):
        assert observe(study_of(x={}), results(x=arm(num_seeds))).at_chance == ("t",)


def test_arms_that_lack_a_seed_or_a_task_or_diverged_are_left_out_of_effects() -> None:
    def left(tasks: str, seeds: tuple[int, ...], loss: float = 1.0) -> list[Left]:
        answers = tuple(record(task, "a", loss=loss) for task in tasks)
        return [Left(seed, Scored(answers)) for seed in seeds]

    arms = {name: {"factors": {"f": name}} for name in ("whole", "seed", "task", "diverged")}
    scored = observe(
        study_of(**arms, plain={}),
        results(
            whole=left("tu", (0, 1)),
            seed=left("tu", (0,)),
            task=left("t", (0, 1)),
            diverged=left("tu", (0, 1), loss=float("nan")),
            plain=left("v", (0, 1)),
        ),
    )
    found = complete(scored.observations, "loss")
    assert [arm for arm in found.arms if found.has("loss", arm)] == ["whole"]
    assert list(found.arms) == list(arms)


def test_costs_are_means_over_parts_and_seeds_of_all_training() -> None:
    def trained(tokens: int, flops: float) -> Trained:
        return Trained(Ledger(real_tokens=tokens, flops=flops))

    study = study_of(one=PART, two=OTHER_PART, none={})
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
