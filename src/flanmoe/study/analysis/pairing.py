"""Scores of several arms over the same seeds, tasks and examples, as one array.

Only what all arms have is compared. A seed with which an arm lacks a task is left out for all arms, and so
is an example that an arm lacks with any seed; both are said. A score that is not finite is refused: leaving
the examples out on which a run diverged would favour the run that diverged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from jaxtyping import Float

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
from flanmoe.study.analysis.metric import Metric
from flanmoe.study.analysis.observations import Observations
from flanmoe.study.analysis.strata import Strata, stratify


@dataclass(frozen=True, slots=True)
class Paired:
    """Scores that can be subtracted from one another. A arms, S seeds, N examples.

    Attributes:
        metric: what was measured.
        arms, seeds: names along the first two axes of `scores`.
        tasks: names of the tasks, in the order in which their examples stand.
        examples: task and key of each example.
        strata: how the examples enter the average.
        scores: the scores.
        left_out: sentences about seeds and examples that not all arms have.
    """

    metric: Metric
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    strata: Strata
    scores: Float[np.ndarray, "A S N"]
    left_out: tuple[str, ...] = ()

    def parts(self, weights: Mapping[str, float]) -> Float[np.ndarray, "S N"]:
        """What each example adds to the contrast with these weights; a row sums to its seed's estimate."""
        arm_weights = np.asarray([weights.get(arm, 0.0) for arm in self.arms])
        return np.tensordot(arm_weights, self.scores, axes=1) * self.strata.weights


def pair(
    observations: Observations, metric: str, arms: Sequence[str], *, tasks: Sequence[str] = ()
) -> Paired:
    """Put the scores of arms side by side.

    Args:
        observations: all scores.
        metric: name of the metric.
        arms: which arms.
        tasks: patterns of the tasks to take (`mmlu/*`); all that any of these arms has where there are none.

    Raises:
        DataError: if an arm has no scores, if the arms have no seed or no example in common, or if a score is
            not finite.
    """
    for arm in arms:
        if not observations.has(metric, arm):
            raise DataError(
                f"Every arm that is compared needs scores of `{metric}`, but arm `{arm}` has 0. Let it finish "
                "(`flanmoe run --resume`), or take it out of the claim."
            )
    chosen = matching(observations.tasks(metric, arms), tasks)
    seeds, without = _complete_seeds(observations, metric, arms, chosen)
    keys: dict[str, list[str]] = {}
    for task in chosen:
        keys[task], missing = _common_examples(observations, metric, (arms, seeds), task)
        without += missing
    order, strata = stratify([len(keys[task]) for task in chosen])
    ordered = tuple(chosen[index] for index in order)
    paired = Paired(
        metric=observations.metrics[metric],
        arms=tuple(arms),
        seeds=seeds,
        tasks=ordered,
        examples=tuple((task, key) for task in ordered for key in keys[task]),
        strata=strata,
        scores=_array(observations, metric, (arms, seeds), {task: keys[task] for task in ordered}),
        left_out=tuple(without),
    )
    _require_finite(paired)
    return paired


def matching(tasks: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the tasks that a pattern names; all of them where there is no pattern.

    Raises:
        DataError: if a pattern names none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(task, pattern) for task in tasks):
            raise DataError(
                f"Each of `tasks` must name at least one task with scores, but `{pattern}` names 0. "
                f"Known: {listing(tasks)}."
            )
    return tuple(
        task
        for task in tasks
        if not patterns or any(fnmatchcase(task, pattern) for pattern in patterns)
    )


def _complete_seeds(
    observations: Observations, metric: str, arms: Sequence[str], tasks: Sequence[str]
) -> tuple[tuple[int, ...], list[str]]:
    """Return the seeds with which every arm has every task, and a sentence about each other one."""
    seeds = sorted({seed for arm in arms for seed in observations.seeds(metric, arm)})
    lacking: dict[int, str] = {}
    for seed in seeds:
        for arm in arms:
            absent = [task for task in tasks if not observations.scores(metric, arm, seed, task)]
            if absent:
                what = (
                    "any task" if len(absent) == len(tasks) else f"task {listing(absent, limit=3)}"
                )
                lacking.setdefault(seed, f"arm `{arm}` has no `{metric}` of {what} with it")
    complete = tuple(seed for seed in seeds if seed not in lacking)
    sentences = [f"Seed {seed} is left out: {reason}." for seed, reason in lacking.items()]
    if not complete:
        raise DataError(
            f"The arms {listing(arms)} need a seed with which each has all {len(tasks)} tasks, but have 0. "
            "Let them finish (`flanmoe run --resume`). " + " ".join(sentences)
        )
    return complete, sentences


def _common_examples(
    observations: Observations,
    metric: str,
    runs: tuple[Sequence[str], Sequence[int]],
    task: str,
) -> tuple[list[str], list[str]]:
    arms, seeds = runs
    sets = [observations.scores(metric, arm, seed, task).keys() for arm in arms for seed in seeds]
    everything = set[str]().union(*sets)
    common = sorted(everything.intersection(*sets))
    if not common:
        raise DataError(
            f"The arms {listing(arms)} need examples of task `{task}` in common, but of {len(everything)} each "
            "is missing somewhere. Evaluate all arms and seeds with the same suite, limit and data."
        )
    number = len(everything) - len(common)
    if not number:
        return common, []
    return common, [
        f"{number} of {len(everything)} examples of task `{task}` are left out: not every run has them."
    ]


def _array(
    observations: Observations,
    metric: str,
    runs: tuple[Sequence[str], Sequence[int]],
    keys: Mapping[str, Sequence[str]],
) -> Float[np.ndarray, "A S N"]:
    arms, seeds = runs
    rows = [
        [
            scores[key]
            for task, own in keys.items()
            for scores in (observations.scores(metric, arm, seed, task),)
            for key in own
        ]
        for arm in arms
        for seed in seeds
    ]
    return np.asarray(rows, dtype=np.float64).reshape(len(arms), len(seeds), -1)


def _require_finite(paired: Paired) -> None:
    bad = ~np.isfinite(paired.scores)
    if not bad.any():
        return
    arm, seed = np.argwhere(bad.any(axis=-1))[0]
    number = int(bad[arm, seed].sum())
    raise DataError(
        f"Scores must be finite, but {number} of {bad.shape[-1]} scores of `{paired.metric.name}` of arm "
        f"`{paired.arms[arm]}` with seed {paired.seeds[seed]} are not. Leaving them out would favour a run "
        "that diverged; find out why it did."
    )
