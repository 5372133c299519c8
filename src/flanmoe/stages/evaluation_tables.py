"""What `flanmoe eval` prints: the plan, the scores, the averages, a comparison."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from flanmoe.evaluation.comparison import Comparison, PairedDifference, SuiteComparison
from flanmoe.evaluation.metrics import Estimate
from flanmoe.evaluation.results import NormalisedAverage, Scores, SuiteResult
from flanmoe.evaluation.suites.plan import EvaluationPlan, PlannedGroup

_UNCLEAR = "the interval holds 0: no evidence either way"


def plan_table(plan: EvaluationPlan, *, on_cpu: bool) -> Table:
    """Return what an evaluation is going to do."""
    time = f"about {duration(plan.seconds)}"
    limit = "every question" if plan.limit is None else f"limit {plan.limit} a group"
    device = "CPU" if on_cpu else "accelerator"
    table = _table(
        f"Plan: {plan.questions:,} questions on the {device}, {time} ({limit}, chains of thought of at most "
        f"{plan.max_new_tokens} tokens)",
        ("group", "tasks", "questions", "shots", "new tokens at most"),
    )
    for group in plan.groups:
        tasks = str(group.tasks)
        if group.num_defined != group.tasks:
            tasks += f" of {group.num_defined}"
        new_tokens = "lm-eval's" if group.new_tokens is None else f"{group.new_tokens:,}"
        table.add_row(group.group, tasks, f"{group.questions:,}", _shots(group), new_tokens)
    return table


def score_table(reference: str, result: SuiteResult) -> Table:
    """Return the scores of every task, or of every group where a suite has groups."""
    columns = ("task", "loss, nats/token", "accuracy", "chance", "examples", "seen")
    table = _table(f"Scores of {reference}", columns)
    if result.groups:
        _add_groups(table, result)
        return table
    for task in result.tasks:
        _add(table, task.task, task.headline, task.num_examples, task.num_seen)
    table.add_section()
    name = "all, without seen ones" if result.num_seen and not result.only_seen else "all"
    _add(table, name, result.pooled, result.num_examples, result.num_seen)
    return table


def average_table(result: SuiteResult) -> Table:
    """Return the chance-normalised averages of a suite of groups."""
    table = _table(
        "Chance-normalised, percent (0 is guessing, 100 is perfect)",
        ("average", "score", "over", "partial"),
    )
    for group in result.groups:
        scores = result.clusters.get(group.group)
        if scores is None or scores.normalised_accuracy is None:
            continue
        found = len(
            {task.part_of or task.task for task in result.tasks if task.cluster == group.group}
        )
        score = _percent(scores.normalised_accuracy, scores.normalised_standard_error)
        over = f"{found} of {group.num_tasks} tasks"
        table.add_row(group.title, score, over, "partial" if group.partial else "")
    table.add_section()
    averages = {"in": "held in", "out": "held out"}
    for side, average in result.held.items():
        _add_average(table, averages[side], average)
    if result.normalised_average is not None:
        _add_average(table, "all", result.normalised_average)
    return table


def comparison_table(first: Path, second: Path, comparison: SuiteComparison) -> Table:
    """Return the paired differences of two results."""
    title = f"{second} minus {first}, paired over {comparison.num_examples} examples"
    table = _table(title, ("metric", "difference", "95 % interval", "note"))
    pooled = comparison.pooled
    _add_difference(table, "loss, nats/token", pooled.loss)
    _add_difference(table, "accuracy", pooled.accuracy)
    _add_mcnemar(table, "McNemar", pooled)
    if not comparison.groups:
        return table
    table.add_section()
    for name, group in comparison.groups.items():
        _add_difference(table, f"{name}: accuracy over tasks", group.macro_accuracy)
        _add_mcnemar(table, f"{name}: McNemar", group.pooled)
    table.add_section()
    _add_difference(table, "normalised average, percent", comparison.normalised_average)
    return table


def notes_of(result: SuiteResult) -> list[str]:
    """Return sentences about what the numbers do not show by themselves."""
    notes: list[str] = []
    if result.num_truncated:
        notes.append(
            f"{result.num_truncated} prompts are longer than the model's positions and were cut on their left."
        )
    unreadable = sum(task.num_unreadable for task in result.tasks)
    unfinished = sum(task.num_unfinished for task in result.tasks)
    if unreadable:
        notes.append(f"{unreadable} answers could not be read and count as wrong.")
    if unfinished:
        notes.append(
            f"{unfinished} answers used up all tokens that the model may write; `--max-new-tokens` allows more."
        )
    return notes


def estimate_text(estimate: Estimate | None) -> str:
    """Write a mean with its standard error over examples."""
    if estimate is None:
        return ""
    error = estimate.standard_error
    return f"{estimate.mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def duration(seconds: float) -> str:
    """Write a time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    return table


def _shots(group: PlannedGroup) -> str:
    if group.shots is None:
        return "lm-eval's"
    least, most = group.shots
    return str(most) if least == most else f"{least} to {most}"


def _add_groups(table: Table, result: SuiteResult) -> None:
    for name, scores in result.clusters.items():
        own = [task for task in result.tasks if task.cluster == name]
        examples = sum(task.num_examples for task in own)
        _add(table, name, scores, examples, sum(task.num_seen for task in own))


def _add(table: Table, name: str, scores: Scores, examples: int, seen: int) -> None:
    chance = "" if scores.chance is None else f"{scores.chance:.3f}"
    cells = (estimate_text(scores.loss), estimate_text(scores.accuracy), chance)
    table.add_row(name, *cells, str(examples), str(seen))


def _percent(mean: float, error: float | None) -> str:
    return f"{mean:.1f}" + ("" if error is None else f" ± {error:.1f}")


def _add_average(table: Table, name: str, average: NormalisedAverage) -> None:
    over = ", ".join(average.groups)
    if average.missing:
        over += f"; without {', '.join(average.missing)}"
    score = _percent(average.mean, average.standard_error)
    table.add_row(name, score, over, "partial" if average.partial else "")


def _add_difference(table: Table, name: str, row: PairedDifference | None) -> None:
    if row is None:
        return
    low, high = row.interval or (float("nan"), float("nan"))
    unclear = row.interval is None or low <= 0 <= high
    interval = f"{low:.4f} to {high:.4f}"
    table.add_row(name, estimate_text(row.difference), interval, _UNCLEAR if unclear else "")


def _add_mcnemar(table: Table, name: str, comparison: Comparison) -> None:
    test = comparison.mcnemar
    if test is not None:
        split = f"{test.only_first} against {test.only_second}"
        table.add_row(name, split, f"p = {test.p_value:.3f}", "")
