"""The questions and exemplars of a few-shot suite, found in the data."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flanmoe.core.errors import DataError
from flanmoe.core.names import listing
from flanmoe.core.seeds import SeedTree
from flanmoe.data.catalogue import known_set
from flanmoe.data.example import Example
from flanmoe.data.sources.exemplars import PREFIX as EXEMPLARS
from flanmoe.data.sources.finding import resolve_data_dir, splits_of
from flanmoe.data.tasks import Task, load_task, rows_of_parts
from flanmoe.evaluation.results import LeftOut, SkippedTask
from flanmoe.evaluation.suites.groups import (
    Part,
    PromptedGroup,
    PromptedSuite,
    PromptedTaskConfig,
)
from flanmoe.evaluation.tasks.few_shot import FewShot, few_shot

# Exemplars are part of a suite's definition: the same for every model, limit and seed of a run.
_EXEMPLAR_SEEDS = SeedTree(0).child("few-shot")


@dataclass(frozen=True, slots=True)
class PromptedQuestions:
    """The questions of one few-shot task.

    Attributes:
        config: the task.
        identity: its name in results, `group/task`.
        shown: the text before every question.
        examples: the questions, without those that are shown as exemplars.
    """

    config: PromptedTaskConfig
    identity: str
    shown: FewShot
    examples: tuple[Example, ...]

    @property
    def name(self) -> str:
        """Name that draws depend on: the same questions in every mode."""
        return self.config.questions.name

    @property
    def size(self) -> int:
        """Number of questions."""
        return len(self.examples)


@dataclass(frozen=True, slots=True)
class LoadedGroup:
    """A group with the tasks that have data."""

    config: PromptedGroup
    tasks: tuple[PromptedQuestions, ...]


@dataclass(frozen=True, slots=True)
class LoadedSuite:
    """A few-shot suite with its data.

    Attributes:
        config: the suite.
        groups: those that have data for at least one task.
        sources: the data sets that questions come from.
        skipped: tasks without data, every one by name.
        left_out: questions that are there and are not asked.
    """

    config: PromptedSuite
    groups: tuple[LoadedGroup, ...]
    sources: tuple[Task, ...]
    skipped: tuple[SkippedTask, ...]
    left_out: tuple[LeftOut, ...]


def load_prompted_suite(suite: PromptedSuite, *, data_dir: Path | None) -> LoadedSuite:
    """Find the data of a suite; what has none is left out by name.

    Raises:
        DataError: if a record cannot be read, or nothing of the suite has data.
    """
    return _Loading(suite, data_dir).load()


class _Absent(Exception):
    """There is no data for a task; the reason for its user."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A task with its exemplars and all of its questions."""

    config: PromptedTaskConfig
    exemplars: tuple[Example, ...]
    questions: tuple[Example, ...]


class _Loading:
    """One pass over a suite: every data set is opened once."""

    def __init__(self, suite: PromptedSuite, data_dir: Path | None) -> None:
        self._suite = suite
        self._folder = resolve_data_dir(data_dir)
        self._sources: dict[str, Task | _Absent] = {}
        self._rows: dict[str, dict[str, list[int]]] = {}
        self._skipped: list[SkippedTask] = []
        self._left_out: Counter[tuple[str, str]] = Counter()

    def load(self) -> LoadedSuite:
        """Find everything, then leave out of the questions what is shown."""
        found = {group.name: self._found(group) for group in self._suite.groups}
        if not any(found.values()):
            reasons = list(dict.fromkeys(skip.reason for skip in self._skipped))
            raise DataError(
                f"The suite `{self._suite.name}` needs data for at least one task, but has it for none of "
                f"{len(self._skipped)}: {reasons[0]}"
            )
        self._count_unknown_parts()
        shown = {
            exemplar.content_hash()
            for tasks in found.values()
            for task in tasks
            for exemplar in task.exemplars
        }
        groups = [
            LoadedGroup(
                group,
                tuple(
                    questions
                    for task in found[group.name]
                    if (questions := self._questions(group, task, shown)) is not None
                ),
            )
            for group in self._suite.groups
        ]
        return LoadedSuite(
            config=self._suite,
            groups=tuple(group for group in groups if group.tasks),
            sources=self._question_sources(),
            skipped=tuple(self._skipped),
            left_out=tuple(
                LeftOut(task=task, reason=reason, number=number)
                for (task, reason), number in self._left_out.items()
            ),
        )

    def _found(self, group: PromptedGroup) -> list[_Found]:
        found: list[_Found] = []
        for task in group.tasks:
            try:
                questions = self._examples(task.questions)
                exemplars = self._exemplars(task, group.shots)
            except _Absent as absent:
                self._skip(group, task, str(absent))
            else:
                found.append(_Found(task, exemplars, questions))
        return found

    def _skip(self, group: PromptedGroup, task: PromptedTaskConfig, reason: str) -> None:
        name = f"{group.name}/{task.name}"
        self._skipped.append(SkippedTask(task=name, reason=reason, group=group.name))

    def _exemplars(self, task: PromptedTaskConfig, shots: int) -> tuple[Example, ...]:
        if task.exemplars is None or not shots:
            return ()
        pool = self._examples(task.exemplars)
        if not task.drawn:
            return pool[:shots]
        order = _EXEMPLAR_SEEDS.child(task.exemplars.name).numpy().permutation(len(pool))
        return tuple(pool[row] for row in order[:shots].tolist())

    def _examples(self, part: Part) -> tuple[Example, ...]:
        source = self._source(part)
        if part.value is None:
            return tuple(source.examples)
        rows = self._rows_of(source, part)
        if part.value not in rows:
            raise _Absent(f"`{source.name}` holds no record of `{part.value}`.")
        return tuple(source.examples[row] for row in rows[part.value])

    def _rows_of(self, source: Task, part: Part) -> dict[str, list[int]]:
        if source.name not in self._rows:
            entry = known_set(part.source.name)
            if entry is None or entry.tasks_field is None:
                raise DataError(
                    f"The catalogue must say which field tells the tasks of `{part.source.name}` apart "
                    "(`tasks_field`), but does not."
                )
            self._rows[source.name] = rows_of_parts(source, entry.tasks_field)
        return self._rows[source.name]

    def _source(self, part: Part) -> Task:
        name = part.source.identity
        if name not in self._sources:
            self._sources[name] = self._opened(part)
        source = self._sources[name]
        if isinstance(source, _Absent):
            raise source
        return source

    def _opened(self, part: Part) -> Task | _Absent:
        name, split = part.source.name, part.source.split
        if name.startswith(EXEMPLARS):
            return load_task(part.source)
        if self._folder is None:
            return _Absent(
                f"No data folder is set (`--data-dir` or FLANMOE_DATA), so there is no data set `{name}`."
            )
        folder = self._folder / name
        if not folder.is_dir():
            return _Absent(f"The data folder {self._folder} holds no data set `{name}`.")
        splits = list(splits_of(folder))
        if split not in splits:
            return _Absent(
                f"The data set `{name}` has no split `{split}`, only {listing(splits) or 'none'}."
            )
        return load_task(part.source, data_dir=self._folder)

    def _questions(
        self, group: PromptedGroup, task: _Found, shown: set[str]
    ) -> PromptedQuestions | None:
        identity = f"{group.name}/{task.config.name}"
        kept = tuple(one for one in task.questions if one.content_hash() not in shown)
        if len(kept) < len(task.questions):
            self._left_out[identity, "shown as a worked example"] = len(task.questions) - len(kept)
        if not kept:
            self._skip(group, task.config, "Each of its questions is shown as a worked example.")
            return None
        description = task.config.description
        if description is None:
            description = _description_of(task.exemplars)
        text = few_shot(
            task.exemplars, description=description, style=task.config.style, mode=group.mode
        )
        return PromptedQuestions(task.config, identity, text, kept)

    def _count_unknown_parts(self) -> None:
        known: dict[str, set[str]] = {}
        for group in self._suite.groups:
            for task in group.tasks:
                part = task.questions
                known.setdefault(part.source.identity, set()).add(part.value or "")
        for name, values in known.items():
            for value, rows in self._rows.get(name, {}).items():
                if value not in values:
                    reason = f"`{value}` is no task of the suite `{self._suite.name}`"
                    self._left_out[name, reason] = len(rows)

    def _question_sources(self) -> tuple[Task, ...]:
        names = {
            task.questions.source.identity for group in self._suite.groups for task in group.tasks
        }
        return tuple(
            source
            for name, source in self._sources.items()
            if name in names and not isinstance(source, _Absent)
        )


def _description_of(exemplars: Sequence[Example]) -> str:
    """The description that comes with worked examples, "" where none does."""
    return str(exemplars[0].metadata.get("instruction", "")) if exemplars else ""
