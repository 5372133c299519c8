"""Builders of records and results that several tests of this folder use."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from flanmoe.core.seeds import SeedTree
from flanmoe.data.renderers import Occasion
from flanmoe.data.sources.base import Locator, Row
from flanmoe.data.tasks import Task, TaskConfig
from flanmoe.evaluation.averages import average
from flanmoe.evaluation.results import ExampleRecord, SuiteResult


@dataclass(frozen=True)
class _Memory:
    """Rows that are there already."""

    kept: tuple[Row, ...]
    evaluation_only: bool = False

    def rows(self) -> Iterator[tuple[Locator, Row]]:
        for number, row in enumerate(self.kept, start=1):
            yield Locator("memory", number), row

    def size(self) -> int:
        return len(self.kept)


def _task(name: str, rows: Sequence[Row], **config: Any) -> Task:
    return Task(TaskConfig(name=name, **config), _Memory(tuple(rows)))


def _quiz(name: str, size: int, *, label: int | None = None) -> Task:
    """A task of four-way questions; the right option moves on by one each time unless `label` is given."""
    rows = [
        {
            "question": f"{name} question {'x' * (index % 7)}{index}?",
            "choices": [f"one{index}", f"two{index}", f"three{index}", f"four{index}"],
            "label": index % 4 if label is None else label,
        }
        for index in range(size)
    ]
    return _task(name, rows)


def _record(
    task: str, key: str, loss: float | None, correct: bool | None = None, **other: Any
) -> ExampleRecord:
    choices = {} if correct is None else _choices(correct)
    values = {"num_tokens": 4, **choices, **other}
    return ExampleRecord(
        task=task,
        key=key,
        content_hash=f"content-{task}-{key}",
        prompt_hash=f"prompt-{task}-{key}",
        loss=loss,
        **values,
    )


def _choices(correct: bool) -> dict[str, Any]:
    return {
        "choice_scores": (-1.0, -2.0, -3.0, -4.0),
        "predicted": 0,
        "label": 0 if correct else 1,
        "correct": correct,
    }


def _result(records: Sequence[ExampleRecord], **other: Any) -> SuiteResult:
    averages = average(records, {record.task: record.task for record in records})
    values: dict[str, Any] = {
        "num_examples": len(records),
        "num_seen": sum(record.seen for record in records),
        "num_truncated": 0,
        "seconds": 1.5,
        "tokens": 100,
        "padding_tokens": 10,
        "model_hash": "0" * 24,
        "settings": {"limit": None},
        "versions": {"python": "3.11"},
    }
    return SuiteResult(
        tasks=averages.tasks,
        pooled=averages.pooled,
        macro=averages.macro,
        clusters=averages.clusters,
        only_seen=averages.only_seen,
        examples=tuple(records),
        **{**values, **other},
    )


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny models are slower with several threads, much slower where other processes want them too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def occasion() -> Occasion:
    """One seed, and a token a word."""
    return Occasion(seeds=SeedTree(0), count_tokens=lambda text: len(text.split()))


@pytest.fixture(scope="session")
def record() -> Callable[..., ExampleRecord]:
    """Build a record; `correct` gives it four choices."""
    return _record


@pytest.fixture(scope="session")
def result() -> Callable[..., SuiteResult]:
    """Build the result that belongs to some records."""
    return _result


@pytest.fixture(scope="session")
def task() -> Callable[..., Task]:
    """Build a task from a name and rows."""
    return _task


@pytest.fixture(scope="session")
def quiz() -> Callable[..., Task]:
    """Build a task of multiple-choice questions from a name and a size."""
    return _quiz
