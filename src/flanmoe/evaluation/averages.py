"""From records of examples to scores: per task, over tasks, over clusters of tasks.

Examples that the model was trained on stay out of the headline numbers, unless there are no others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flanmoe.core.errors import DataError
from flanmoe.evaluation.metrics import (
    Estimate,
    chance_normalised,
    estimate_mean,
    macro_average,
    with_pooled_errors,
)
from flanmoe.evaluation.results import ExampleRecord, Scores, TaskScore


@dataclass(frozen=True, slots=True)
class Averages:
    """Scores over a whole suite; the fields mean what they mean in `SuiteResult`."""

    tasks: tuple[TaskScore, ...]
    pooled: Scores
    macro: Scores
    clusters: dict[str, Scores]
    only_seen: bool


def average(
    records: Sequence[ExampleRecord],
    clusters: Mapping[str, str],
    *,
    parts: Mapping[str, str] | None = None,
) -> Averages:
    """Return every average of a suite.

    Args:
        records: one per example, of all tasks.
        clusters: for each task the cluster that it belongs to; its order is the order of the tasks.
        parts: for tasks that are one part of a task the name of the whole one; parts are averaged first.

    Raises:
        DataError: if there is no record.
    """
    parts = parts or {}
    by_task: dict[str, list[ExampleRecord]] = {task: [] for task in clusters}
    for record in records:
        by_task[record.task].append(record)
    tasks = tuple(
        task_score(own, cluster=clusters[task], part_of=parts.get(task))
        for task, own in by_task.items()
        if own
    )
    only_seen = all(task.only_seen for task in tasks)
    counted = [task for task in tasks if only_seen or not task.only_seen]
    members: dict[str, list[TaskScore]] = {}
    for task in counted:
        members.setdefault(task.cluster, []).append(task)
    return Averages(
        tasks=tasks,
        pooled=example_scores([row for row in records if only_seen or not row.seen]),
        macro=over_tasks(counted),
        clusters={cluster: over_tasks(own) for cluster, own in members.items()},
        only_seen=only_seen,
    )


def task_score(
    records: Sequence[ExampleRecord], *, cluster: str, part_of: str | None = None
) -> TaskScore:
    """Return the scores of one task from all of its records.

    Raises:
        DataError: if there is no record.
    """
    seen = [record for record in records if record.seen]
    new = [record for record in records if not record.seen]
    return TaskScore(
        task=records[0].task if records else "",
        cluster=cluster,
        part_of=part_of,
        headline=example_scores(new or seen),
        only_seen=not new,
        seen=example_scores(seen) if seen else None,
        num_examples=len(records),
        num_seen=len(seen),
        num_truncated=sum(record.truncated for record in records),
        num_unreadable=sum(
            record.output is not None and record.extracted is None for record in records
        ),
        num_unfinished=sum(record.unfinished for record in records),
    )


def example_scores(records: Sequence[ExampleRecord]) -> Scores:
    """Return the scores over examples, each counting the same; errors with tasks as clusters beside them.

    Raises:
        DataError: if there is no record.
    """
    if not records:
        raise DataError(
            "Scores need at least one example, but found 0. Evaluate some examples first."
        )
    answered = [record for record in records if record.score is not None]
    loss = _mean_by_task([(row.task, row.loss) for row in records if row.loss is not None])
    accuracy = _mean_by_task([(row.task, row.score) for row in answered if row.score is not None])
    chances = [record.chance for record in answered if record.chance is not None]
    # Over examples some of which have no chance level a normalised score would mean nothing.
    if accuracy is None or len(chances) < len(answered):
        return Scores(loss=loss, accuracy=accuracy)
    chance = estimate_mean(chances).mean
    error = accuracy.standard_error
    return Scores(
        loss=loss,
        accuracy=accuracy,
        chance=chance,
        normalised_accuracy=chance_normalised(100 * accuracy.mean, 100 * chance),
        normalised_standard_error=None if error is None else 100 * error / (1 - chance),
    )


def over_tasks(tasks: Sequence[TaskScore]) -> Scores:
    """Return the average over tasks, each counting the same; the parts of one task are averaged first."""
    headlines = _with_errors([task.headline for task in tasks])
    wholes: dict[str, list[Scores]] = {}
    for task, headline in zip(tasks, headlines, strict=True):
        wholes.setdefault(task.part_of or task.task, []).append(headline)
    return macro_scores([own[0] if len(own) == 1 else macro_scores(own) for own in wholes.values()])


def macro_scores(scores: Sequence[Scores]) -> Scores:
    """Return the average over tasks, each counting the same, of what they have: losses, accuracies.

    Raises:
        DataError: if there is no task.
    """
    if not scores:
        raise DataError("An average over tasks needs at least one task, but found 0.")
    losses = [score.loss for score in scores if score.loss is not None]
    accuracies = [score.accuracy for score in scores if score.accuracy is not None]
    chances = [score.chance for score in scores if score.chance is not None]
    normalised = [
        score.normalised_accuracy for score in scores if score.normalised_accuracy is not None
    ]
    errors = [score.normalised_standard_error for score in scores if score.chance is not None]
    return Scores(
        loss=macro_average(losses) if losses else None,
        accuracy=macro_average(accuracies) if accuracies else None,
        chance=estimate_mean(chances).mean if chances else None,
        normalised_accuracy=estimate_mean(normalised).mean if normalised else None,
        normalised_standard_error=mean_error(errors) if normalised else None,
    )


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Return the standard error of a mean of independent numbers, None where one of theirs is not known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def _mean_by_task(values: Sequence[tuple[str, float]]) -> Estimate | None:
    if not values:
        return None
    return estimate_mean([value for _, value in values], clusters=[task for task, _ in values])


def _with_errors(scores: Sequence[Scores]) -> list[Scores]:
    """Scores of tasks, those of a single example with an error from the others (see `with_pooled_errors`)."""
    places = [place for place, score in enumerate(scores) if score.accuracy is not None]
    losses = [place for place, score in enumerate(scores) if score.loss is not None]
    changed = list(scores)
    for place, loss in zip(losses, _pooled([scores[i].loss for i in losses]), strict=True):
        changed[place] = changed[place].model_copy(update={"loss": loss})
    for place, accuracy in zip(places, _pooled([scores[i].accuracy for i in places]), strict=True):
        chance, error = scores[place].chance, accuracy.standard_error
        update: dict[str, object] = {"accuracy": accuracy}
        if chance is not None and error is not None:
            update["normalised_standard_error"] = 100 * error / (1 - chance)
        changed[place] = changed[place].model_copy(update=update)
    return changed


def _pooled(estimates: Sequence[Estimate | None]) -> list[Estimate]:
    return with_pooled_errors([estimate for estimate in estimates if estimate is not None])
