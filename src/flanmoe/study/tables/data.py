"""Tables of what was trained on."""

from collections.abc import Sequence

from flanmoe.study.number_text import exact, listed, percent
from flanmoe.study.report_data import DataReport, MixtureData, ReportData, TaskData
from flanmoe.study.tables.base import Section, TextTable


def data_section(data: ReportData) -> Section:
    """What was trained on, at which shares, and what was kept back."""
    report = data.data
    counts = TextTable(
        ("quantity", "value"),
        (
            (_seen_label(report), exact(report.num_seen)),
            ("draws dropped (longer than a row)", exact(report.num_dropped)),
            ("draws truncated", exact(report.num_truncated)),
            ("few-shot draws without exemplars, left out", exact(report.num_without_exemplars)),
            ("padding, share of all tokens", percent(report.padding_share)),
        )
        if data.was_tuned
        else (),
    )
    sentences = []
    if report.held_out:
        sentences.append(f"Held out from training: {listed(report.held_out)}.")
    if report.evaluation_only:
        sentences.append(
            f"Only ever evaluated, never trained on: {listed(report.evaluation_only)}."
        )
    several = len(report.mixtures) > 1
    mixtures = [
        table
        for mixture in report.mixtures
        for table in _mixture(
            mixture, title=f"Mixture of {listed(mixture.arms)}" if several else ""
        )
    ]
    return Section("Data", (*mixtures, counts), tuple(sentences))


def _mixture(mixture: MixtureData, *, title: str) -> tuple[TextTable, ...]:
    """What a mixture holds and what was drawn: by groups of tasks that share a rate, and by task."""
    tasks = TextTable(
        (
            "training task",
            "examples that it holds",
            "records left out",
            "draws trained on",
            "tokens of them",
            "share asked for",
            "share of draws",
            "share of tokens",
        ),
        tuple(
            (
                task.task,
                exact(task.num_examples),
                exact(task.num_rejected),
                exact(task.num_draws),
                exact(task.num_tokens),
                percent(task.rate),
                percent(task.share),
                percent(_token_share(mixture, [task])),
            )
            for task in mixture.tasks
        ),
        title=title,
    )
    groups = TextTable(
        ("group of tasks", "tasks", "share asked for", "share of draws", "share of tokens"),
        tuple(
            (
                name,
                exact(len(members)),
                percent(sum(task.rate for task in members)),
                percent(sum(task.share for task in members)),
                percent(_token_share(mixture, members)),
            )
            for name, members in mixture.groups.items()
        ),
        title=title,
    )
    return (groups, tasks) if groups.rows else (tasks,)


def _token_share(mixture: MixtureData, tasks: Sequence[TaskData]) -> float:
    total = sum(task.num_tokens for task in mixture.tasks)
    return sum(task.num_tokens for task in tasks) / total if total else 0.0


def _seen_label(report: DataReport) -> str:
    several = f", most of {exact(report.num_tunings)} tunings" if report.num_tunings > 1 else ""
    return f"different examples trained on{several}"
