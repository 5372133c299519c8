"""From records of examples to scores: per task, over tasks, over clusters of tasks.

Examples that the model was trained on stay out of the headline numbers, unless there are no others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flanmoe.evaluation.metrics import chance_normalised, estimate_mean, macro_average
from flanmoe.evaluation.results import ExampleRecord, Scores, TaskScore


@dataclass(frozen=True, slots=True)
class Averages:
    """Scores over a whole suite; the fields mean what they mean in `SuiteResult`."""

    tasks: tuple[TaskScore, ...]
    pooled: Scores
    macro: Scores
    clusters: dict[str, Scores]
    only_seen: bool


def average(records: Sequence[ExampleRecord], clusters: Mapping[str, str]) -> Averages:
    """Return every average of a suite.

    Args:
        records: one per example, of all tasks.
        clusters: for each task the cluster that it belongs to; its order is the order of the tasks.

    Raises:
        DataError: if there is no record.
    """
    by_task = {
        task: own for task in clusters if (own := [row for row in records if row.task == task])
    }
    tasks = tuple(task_score(own, cluster=clusters[task]) for task, own in by_task.items())
    only_seen = all(task.only_seen for task in tasks)
    counted = [task for task in tasks if only_seen or not task.only_seen]
    members: dict[str, list[Scores]] = {}
    for task in counted:
        members.setdefault(task.cluster, []).append(task.headline)
    return Averages(
        tasks=tasks,
        pooled=example_scores([row for row in records if only_seen or not row.seen]),
        macro=macro_scores([task.headline for task in counted]),
        clusters={cluster: macro_scores(scores) for cluster, scores in members.items()},
        only_seen=only_seen,
    )


def task_score(records: Sequence[ExampleRecord], *, cluster: str) -> TaskScore:
    """Return the scores of one task from all of its records.

    Raises:
        DataError: if there is no record.
    """
    seen = [record for record in records if record.seen]
    new = [record for record in records if not record.seen]
    return TaskScore(
        task=records[0].task if records else "",
        cluster=cluster,
        headline=example_scores(new or seen),
        only_seen=not new,
        seen=example_scores(seen) if seen else None,
        num_examples=len(records),
        num_seen=len(seen),
        num_truncated=sum(record.truncated for record in records),
    )


def example_scores(records: Sequence[ExampleRecord]) -> Scores:
    """Return the scores over examples, each counting the same; errors with tasks as clusters beside them.

    Raises:
        DataError: if there is no record.
    """
    loss = estimate_mean(
        [record.loss for record in records], clusters=[record.task for record in records]
    )
    answered = [(record, record.chance) for record in records if record.correct is not None]
    chances = [chance for _, chance in answered if chance is not None]
    if not chances:
        return Scores(loss=loss)
    accuracy = estimate_mean(
        [float(bool(record.correct)) for record, _ in answered],
        clusters=[record.task for record, _ in answered],
    )
    chance = estimate_mean(chances).mean
    return Scores(
        loss=loss,
        accuracy=accuracy,
        chance=chance,
        normalised_accuracy=chance_normalised(100 * accuracy.mean, 100 * chance),
    )


def macro_scores(scores: Sequence[Scores]) -> Scores:
    """Return the average over tasks, each counting the same; accuracy over those tasks that have one.

    Raises:
        DataError: if there is no task.
    """
    loss = macro_average([score.loss for score in scores])
    accuracies = [score.accuracy for score in scores if score.accuracy is not None]
    if not accuracies:
        return Scores(loss=loss)
    chances = [score.chance for score in scores if score.chance is not None]
    normalised = [
        score.normalised_accuracy for score in scores if score.normalised_accuracy is not None
    ]
    return Scores(
        loss=loss,
        accuracy=macro_average(accuracies),
        chance=estimate_mean(chances).mean,
        normalised_accuracy=estimate_mean(normalised).mean,
    )
