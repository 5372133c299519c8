"""Which questions of everything that was loaded are asked: per group and mode, spread over its tasks."""

from dataclasses import dataclass

from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example
from flanmoe.data.tasks import Task
from flanmoe.evaluation.suites.limits import drawn_rows, limited, shares
from flanmoe.evaluation.suites.loading import Loaded
from flanmoe.evaluation.suites.questions import LoadedGroup, PromptedQuestions


@dataclass(frozen=True, slots=True)
class ChosenGroup:
    """A few-shot group with the questions of each task that are asked."""

    group: LoadedGroup
    tasks: tuple[tuple[PromptedQuestions, tuple[Example, ...]], ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The questions that an evaluation asks.

    Attributes:
        reference: tasks of ours with their questions.
        prompted: few-shot groups with theirs.
        harness: rows of lm-eval's tasks by their names, ascending.
    """

    reference: tuple[tuple[Task, tuple[Example, ...]], ...]
    prompted: tuple[ChosenGroup, ...]
    harness: dict[str, list[int]]

    @property
    def num_questions(self) -> int:
        """How many there are."""
        return (
            sum(len(examples) for _, examples in self.reference)
            + sum(len(examples) for group in self.prompted for _, examples in group.tasks)
            + sum(map(len, self.harness.values()))
        )


def choose(loaded: Loaded, limit: int | None, *, seeds: SeedTree) -> Chosen:
    """Draw the questions.

    Args:
        loaded: what there is.
        limit: most questions of the plain tasks together, of each few-shot group, and of each name of
            lm-eval; None for all.
        seeds: where the draw comes from; the modes of one task draw the same questions.

    Raises:
        ConfigError: if the limit leaves a task without a question.
    """
    reference = limited(loaded.tasks, limit if loaded.tasks else None, seeds=seeds)
    groups = () if loaded.prompted is None else loaded.prompted.groups
    return Chosen(
        reference=tuple(
            (task, tuple(examples)) for task, examples in zip(loaded.tasks, reference, strict=True)
        ),
        prompted=tuple(_chosen_group(group, limit, seeds) for group in groups),
        harness=_harness_rows(loaded, limit, seeds),
    )


def _chosen_group(group: LoadedGroup, limit: int | None, seeds: SeedTree) -> ChosenGroup:
    examples = limited(group.tasks, limit, seeds=seeds)
    pairs = zip(group.tasks, map(tuple, examples), strict=True)
    return ChosenGroup(group, tuple(pairs))


def _harness_rows(loaded: Loaded, limit: int | None, seeds: SeedTree) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for group in loaded.harness:
        sizes = [len(task.eval_docs) for task in group.tasks.values()]
        counts = sizes if limit is None else shares(sizes, limit)
        for name, size, count in zip(group.tasks, sizes, counts, strict=True):
            rows[name] = drawn_rows(name, size, count, seeds=seeds)
    return rows
