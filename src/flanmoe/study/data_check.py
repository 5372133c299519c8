"""What is wrong with data: every finding with its count; what `flanmoe data validate` does.

Nothing that is wrong stops the check: it is written down, and the next task is looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flanmoe.core.console import Advance, progress
from flanmoe.core.errors import DataError, UserError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import render_chat
from flanmoe.data.contamination import EvaluationIndex, overlaps
from flanmoe.data.example import Example
from flanmoe.data.mixture import Mixture
from flanmoe.data.renderers.template import NoExemplarError
from flanmoe.data.sources.finding import AbsentDataError
from flanmoe.data.statistics import length_of, repeats
from flanmoe.data.store import ExampleStore, example_store
from flanmoe.data.tasks import Task, TaskConfig, expand, load_task
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.evaluation.suites import SuiteTask
from flanmoe.stages.held_model import HeldModel
from flanmoe.study.data_findings import MOST_DETAILS, DataCheck, Finding, Kind, overlap_sentences
from flanmoe.study.data_groups import DataGroup
from flanmoe.study.data_stats import sample

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class _Read:
    """A task, and what could be read of it."""

    task: Task
    store: ExampleStore


def check_data(
    groups: Sequence[DataGroup], *, limit: int | None, data_dir: Path | None
) -> DataCheck:
    """Look for everything that is wrong with the tasks of some groups.

    Args:
        groups: what to look at; a task that stands in several is read once.
        limit: most examples of a task whose length is taken, drawn from a fixed seed; None for all.
            Everything else is checked of all examples.
        data_dir: the data folder.
    """
    return _Checking(groups, limit, data_dir).run()


class _Checking:
    """One check: what has been read so far, and what was found."""

    def __init__(
        self, groups: Sequence[DataGroup], limit: int | None, data_dir: Path | None
    ) -> None:
        self._groups = groups
        self._limit = limit
        self._data_dir = data_dir
        self._check = DataCheck()
        # By the name of the task.
        self._read: dict[str, _Read] = {}
        self._failed: set[str] = set()

    def run(self) -> DataCheck:
        """Look at everything, one kind of thing after another."""
        found = [self._found(group) for group in self._groups]
        self._read_all([task for tasks in found for task in tasks])
        for group, tasks in zip(self._groups, found, strict=True):
            self._check_mixture(group, tasks)
        self._check_duplicates()
        self._check_lengths(found)
        self._check_overlap(found)
        return self._check

    def _add(self, kind: Kind, task: str, number: int, details: Sequence[str]) -> None:
        self._check.findings.append(Finding(kind, task, number, tuple(details)))

    def _found(self, group: DataGroup) -> list[Task]:
        """Find the tasks of a group; one by one where they cannot be found together."""
        try:
            tasks, skipped = group.load(self._data_dir)
        except UserError as error:
            found = [task for config in group.configs for task in self._found_singly(config)]
            if not self._is_told(str(error)):
                self._add("settings", ", ".join(group.where) or "the task", 1, [str(error)])
            return found
        for skip in skipped:
            self._note(f"The task `{skip.task}` is optional and left out. {skip.reason}")
        return tasks

    def _found_singly(self, config: TaskConfig) -> list[Task]:
        try:
            return [load_task(single, data_dir=self._data_dir) for single in expand([config])]
        except UserError as error:
            optional = isinstance(config, SuiteTask) and config.optional
            if optional and isinstance(error, AbsentDataError):
                self._note(f"The task `{config.identity}` is optional and left out. {error}")
            elif not self._is_told(str(error)):
                self._add("missing", config.identity, 1, [str(error)])
            return []

    def _is_told(self, sentence: str) -> bool:
        return any(sentence in found.details for found in self._check.findings)

    def _note(self, note: str) -> None:
        if note not in self._check.notes:
            self._check.notes.append(note)

    def _read_all(self, tasks: Sequence[Task]) -> None:
        by_name = {task.name: task for task in tasks}
        with progress("reading", total=len(by_name), unit="tasks") as advance:
            for name, task in by_name.items():
                self._read_task(task)
                advance(note=name)

    def _read_task(self, task: Task) -> None:
        try:
            store = example_store(task.source, labels=task.config.labels, on_bad_record="skip")
        except DataError as error:
            self._failed.add(task.name)
            self._add("unreadable", task.name, 1, [str(error)])
            return
        if store.rejected:
            reasons = [record.reason for record in store.rejected]
            self._add("rejected", task.name, len(reasons), reasons)
        self._check.examples[task.name] = len(store.examples)
        if store.examples:
            self._read[task.name] = _Read(task, store)
            return
        self._failed.add(task.name)
        number = len(store.rejected)
        held = f"all of its {number:,} records are rejected" if number else "it has 0 records"
        sentence = f"The task `{task.name}` must hold at least one example, but {held}."
        self._add("empty", task.name, 1, [sentence])

    def _check_mixture(self, group: DataGroup, tasks: Sequence[Task]) -> None:
        """Mix as a tuning would, so that rates and tasks for evaluation only are looked at."""
        if group.mixture is None or not tasks or any(task.name in self._failed for task in tasks):
            return
        try:
            Mixture(
                tasks,
                seeds=SeedTree(0),
                temperature=group.mixture.temperature,
                maximum_per_task=group.mixture.maximum_per_task,
            )
        except UserError as error:
            self._add("settings", ", ".join(group.where), 1, [str(error)])

    def _check_duplicates(self) -> None:
        total = sum(len(read.store.examples) for read in self._read.values())
        with progress("looking for repeats", total=total, unit="examples") as advance:
            for name, read in self._read.items():
                examples = read.store.examples
                pairs = repeats(_counted(read.store.content_hashes, advance, name)).tolist()
                details = [
                    f"`{examples[row].key}` asks and answers the same as `{examples[first].key}`"
                    for row, first in pairs[:MOST_DETAILS]
                ]
                if pairs:
                    self._add("duplicates", name, len(pairs), details)

    def _check_lengths(self, found: Sequence[Sequence[Task]]) -> None:
        """Measure what is packed, once for each tokenizer and row length."""
        places = {
            (group.model, group.packing_length, task.name): task
            for group, tasks in zip(self._groups, found, strict=True)
            for task in tasks
            if group.packing_length is not None and task.name in self._read
        }
        tokenizers: dict[str, Tokenizer] = {}
        total = sum(self._num_measured(task) for task in places.values())
        with progress("measuring", total=total, unit="examples") as advance:
            for (model, packing_length, _), task in places.items():
                if model not in tokenizers:
                    tokenizers[model] = HeldModel(model).text_tokenizer()
                self._check_length(task, packing_length, tokenizers[model], advance)

    def _num_measured(self, task: Task) -> int:
        size = len(self._read[task.name].store.examples)
        return size if self._limit is None else min(self._limit, size)

    def _check_length(
        self, task: Task, packing_length: int, tokenizer: Tokenizer, advance: Advance
    ) -> None:
        longer: list[str] = []
        broken: list[str] = []
        examples = self._read[task.name].store.examples
        if not self._has_renderer(task):
            advance(self._num_measured(task), note=task.name)
            return
        for example in sample(examples, self._limit, task.name):
            advance(note=task.name)
            try:
                # Few-shot samples that no exemplar fits before are left out of training, and counted.
                with suppress(NoExemplarError):
                    rendered = render_chat(example, task.renderer, tokenizer, task.name)
                    tokens = length_of(rendered, tokenizer).tokens
                    if tokens > packing_length:
                        longer.append(
                            f"`{example.key}`: {tokens:,} tokens, a row {packing_length:,}"
                        )
            except UserError as error:
                broken.append(f"`{example.key}`: {error}")
        checked = self._num_measured(task)
        if checked < len(examples):
            self._note(f"{task.name}: the length of {checked:,} of {len(examples):,} was checked.")
        if longer:
            self._add("too_long", task.name, len(longer), longer[:MOST_DETAILS])
        if broken:
            self._add("not_rendered", task.name, len(broken), broken[:MOST_DETAILS])

    def _has_renderer(self, task: Task) -> bool:
        try:
            return bool(task.renderer)
        except UserError as error:
            self._add("settings", task.name, 1, [str(error)])
            return False

    def _check_overlap(self, found: Sequence[Sequence[Task]]) -> None:
        tuned = self._used("tuned", found)
        evaluated = self._used("evaluated", found)
        if not tuned or not evaluated:
            return
        scored = {_rows_of(task): name for name, task in evaluated.items()}
        for name, task in tuned.items():
            if other := scored.get(_rows_of(task)):
                self._add("tuned_and_evaluated", name, 1, [f"it is scored on as {other}"])
        total = sum(len(self._read[name].store.examples) for name in (*tuned, *evaluated))
        with progress("comparing", total=total, unit="examples") as advance:
            index = EvaluationIndex.of(self._streams(evaluated, advance))
            report = overlaps(self._streams(tuned, advance), index)
        self._check.overlap = report
        for name, counts in report.training.items():
            if counts.total:
                pairs = [pair for pair in report.pairs if pair.training_task == name]
                details = [sentence for pair in pairs for sentence in overlap_sentences(pair)]
                self._add("overlap", name, counts.total, details)

    def _used(self, use: str, found: Sequence[Sequence[Task]]) -> dict[str, Task]:
        return {
            task.name: task
            for group, tasks in zip(self._groups, found, strict=True)
            for task in tasks
            if group.use == use and task.name in self._read
        }

    def _streams(self, tasks: Mapping[str, Task], advance: Advance) -> dict[str, Iterator[Example]]:
        return {name: _counted(self._read[name].store.examples, advance, name) for name in tasks}


def _counted(items: Sequence[_Item], advance: Advance, note: str) -> Iterator[_Item]:
    for item in items:
        yield item
        advance(note=note)


def _rows_of(task: Task) -> tuple[str, str, str | None]:
    """Return what says which rows a task has, however it renders them."""
    return task.config.name, task.config.split, task.config.subset
