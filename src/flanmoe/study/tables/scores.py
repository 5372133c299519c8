"""Tables of scores: paired differences, by kind of task, by task."""

from collections.abc import Sequence

from flanmoe.study.arm_report import ArmReport, ClusterScore, Evaluation, TaskScore
from flanmoe.study.number_text import difference_unit, exact, percent
from flanmoe.study.report_data import Comparison, ReportData
from flanmoe.study.report_text import accuracy_text, difference_text, loss_text
from flanmoe.study.tables.base import MOST_ARM_COLUMNS, Section, TextTable

_MOMENTS = ("loss before", "loss after", "accuracy before", "accuracy after")
_MOST_TASK_ROWS = 600


def comparisons(data: ReportData) -> Section:
    """Every paired difference with its interval."""
    rows = tuple(
        (
            f"{item.subject} after tuning",
            item.reference if item.kind == "arms" else "before tuning",
            item.metric,
            f"{difference_text(item, item.mean)} {difference_unit(item.metric)}",
            _error_text(item, item.standard_error),
            _error_text(item, item.clustered_standard_error),
            f"{difference_text(item, item.low)} to {difference_text(item, item.high)}",
            f"{100 * item.confidence:g} %",
            exact(item.num_examples),
            "" if item.seed is None else str(item.seed),
            item.verdict,
        )
        for item in data.comparisons
    )
    header = (
        "subject",
        "minus",
        "metric",
        "mean",
        "standard error",
        "with tasks as clusters",
        "interval",
        "level",
        "n",
        "seed",
        "verdict",
    )
    return Section("Paired differences", (TextTable(header, rows),))


def _error_text(comparison: Comparison, error: float | None) -> str:
    return "n/a" if error is None else difference_text(comparison, error).lstrip("+")


def clusters(data: ReportData) -> Section:
    """Scores by kind of task, a column an arm; nothing where there is one kind only.

    Many arms have a row each for every kind.
    """
    if len(data.arms) > MOST_ARM_COLUMNS:
        return _many_clusters(data)
    tables: list[TextTable] = []
    for moment in ("before", "after"):
        scored = [(arm.label, found) for arm in data.arms if (found := getattr(arm, moment))]
        names = dict.fromkeys(item.cluster for _, found in scored for item in found.clusters)
        if len(names) < 2:
            continue
        header = ("kind of task", "tasks")
        for metric in ("loss", "accuracy"):
            header = (*header, *(f"{metric}, {label}" for label, _ in scored))
        rows = tuple(_cluster_row(name, [found for _, found in scored]) for name in names)
        title = f"{moment.capitalize()} tuning" if data.was_tuned else ""
        tables.append(TextTable(header, rows, title=title))
    return Section("Scores by kind of task", tuple(tables))


def _many_clusters(data: ReportData) -> Section:
    names = dict.fromkeys(
        item.cluster for arm in data.arms for found in _moments(arm) for item in found.clusters
    )
    if len(names) < 2:
        return Section("Scores by kind of task", ())
    rows = [
        (name, arm.label, *_moment_cells(_cluster(arm.before, name), _cluster(arm.after, name)))
        for name in names
        for arm in data.arms
        if _moments(arm)
    ]
    table = TextTable(("kind of task", "arm", *_MOMENTS), tuple(rows))
    return Section("Scores by kind of task", (table,))


def _moments(arm: ArmReport) -> list[Evaluation]:
    return [found for found in (arm.before, arm.after) if found is not None]


def _cluster(evaluation: Evaluation | None, name: str) -> ClusterScore | None:
    found = evaluation.clusters if evaluation else ()
    return next((item for item in found if item.cluster == name), None)


def _moment_cells(
    before: ClusterScore | TaskScore | None, after: ClusterScore | TaskScore | None
) -> tuple[str, ...]:
    """Loss and accuracy of both moments; empty where the arm was not evaluated then."""
    moments = (before, after)
    return (
        *(loss_text(found.loss) if found else "" for found in moments),
        *(accuracy_text(found.accuracy) if found else "" for found in moments),
    )


def _cluster_row(name: str, evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    found = [
        next((item for item in evaluation.clusters if item.cluster == name), None)
        for evaluation in evaluations
    ]
    num_tasks = max(item.num_tasks for item in found if item)
    losses = (loss_text(item.loss if item else None) for item in found)
    accuracies = (accuracy_text(item.accuracy if item else None) for item in found)
    return (name, exact(num_tasks), *losses, *accuracies)


def tasks(data: ReportData) -> Section:
    """Scores task by task, a table an arm and moment; of many arms one table, the arms of a task together."""
    if len(data.arms) > MOST_ARM_COLUMNS:
        return Section("Scores by task", (_many_tasks(data),))
    tables = tuple(
        TextTable(
            (
                "task",
                "n",
                "loss",
                "accuracy",
                "chance",
                "n with choices",
                "seen in training",
                "prompts cut",
            ),
            tuple(_task_row(task) for task in evaluation.tasks),
            title=f"{arm.label}, {moment} tuning" if arm.was_tuned else arm.label,
        )
        for arm in data.arms
        for moment, evaluation in (("before", arm.before), ("after", arm.after))
        if evaluation is not None and evaluation.tasks
    )
    return Section("Scores by task", tables)


def _many_tasks(data: ReportData) -> TextTable:
    names = list(
        dict.fromkeys(
            item.task for arm in data.arms for found in _moments(arm) for item in found.tasks
        )
    )
    shown = names[: max(1, _MOST_TASK_ROWS // len(data.arms))]
    rows: list[tuple[str, ...]] = []
    for name in shown:
        for arm in data.arms:
            before, after = _task(arm.before, name), _task(arm.after, name)
            known = after or before
            if known is not None:
                cells = _moment_cells(before, after)
                rows.append((name, arm.label, _num_examples(known), *cells, exact(known.num_seen)))
    note = ""
    if len(shown) < len(names):
        note = f"The first {len(shown)} of {len(names)} tasks; report.json has all."
    header = ("task", "arm", "n", *_MOMENTS, "seen in training")
    return TextTable(header, tuple(rows), note=note)


def _task(evaluation: Evaluation | None, name: str) -> TaskScore | None:
    found = evaluation.tasks if evaluation else ()
    return next((item for item in found if item.task == name), None)


def _num_examples(task: TaskScore) -> str:
    counts = [score.num_examples for score in (task.loss, task.accuracy) if score]
    return exact(max(counts)) if counts else ""


def _task_row(task: TaskScore) -> tuple[str, ...]:
    loss, accuracy = task.loss, task.accuracy
    chance = accuracy.chance if accuracy else None
    return (
        task.task,
        exact(loss.num_examples) if loss else "",
        loss_text(loss),
        accuracy_text(accuracy),
        "" if chance is None else percent(chance),
        exact(accuracy.num_examples) if accuracy else "",
        exact(task.num_seen),
        exact(task.num_truncated),
    )
