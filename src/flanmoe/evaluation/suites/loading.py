"""From a configuration to everything that an evaluation scores, found in the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flanmoe.core.console import warn
from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing
from flanmoe.data.sources.finding import AbsentDataError
from flanmoe.data.tasks import Task, expand, load_task
from flanmoe.evaluation.results import LeftOut, SkippedTask
from flanmoe.evaluation.suites.config import SuiteConfig, SuiteTask
from flanmoe.evaluation.suites.limits import check_limit
from flanmoe.evaluation.suites.named import prompted_suite
from flanmoe.evaluation.suites.questions import LoadedSuite, load_prompted_suite
from flanmoe.evaluation.tasks.harness import (
    HARNESS_PREFIX,
    HarnessGroup,
    harness_knows,
    load_harness_group,
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that an evaluation scores.

    Attributes:
        tasks: tasks of ours that are scored on their reference answers.
        prompted: a suite of few-shot groups, None where the evaluation is of none.
        harness: tasks of lm-eval, by the names that they were asked for with.
        skipped: tasks without data.
        left_out: questions that are there and are not asked.
    """

    tasks: tuple[Task, ...] = ()
    prompted: LoadedSuite | None = None
    harness: tuple[HarnessGroup, ...] = ()
    skipped: tuple[SkippedTask, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def data_sets(self) -> list[Task]:
        """The data sets of ours that questions come from."""
        return [*self.tasks, *(self.prompted.sources if self.prompted else ())]

    def num_questions(self, limit: int | None) -> int:
        """Return how many questions an evaluation asks with this limit (see `SuiteConfig.limit`)."""
        groups = [
            sum(task.size for task in self.tasks),
            *(
                sum(task.size for task in group.tasks)
                for group in (self.prompted.groups if self.prompted else ())
            ),
            *(sum(len(task.eval_docs) for task in group.tasks.values()) for group in self.harness),
        ]
        return sum(size if limit is None else min(size, limit) for size in groups)


def load_evaluation(config: SuiteConfig, *, data_dir: Path | None) -> Loaded:
    """Find the data of all tasks.

    Prints nothing: a suite is loaded to be planned and again to be scored (see `warn_of_skipped`).

    Raises:
        DataError: if a task that is not optional is not known, or no task has data.
        ConfigError: if a task comes twice, or the limit leaves a task without an example.
    """
    suite = None if config.suite is None else prompted_suite(config.suite)
    if suite is not None:
        prompted = load_prompted_suite(suite, data_dir=data_dir)
        for group in prompted.groups:
            check_limit(len(group.tasks), config.limit, group=group.config.name)
        return Loaded(prompted=prompted, skipped=prompted.skipped, left_out=prompted.left_out)
    return _load_listed(config, data_dir)


def load_suite(
    config: SuiteConfig, *, data_dir: Path | None
) -> tuple[list[Task], list[SkippedTask]]:
    """Return the data sets of ours that have data, and the tasks that have none with the reason.

    Prints nothing (see `warn_of_skipped`).

    Raises:
        DataError: if a task that is not optional is not known, or no task has data.
        ConfigError: if a task comes twice, or the limit leaves a task without an example.
    """
    loaded = load_evaluation(config, data_dir=data_dir)
    return loaded.data_sets, list(loaded.skipped)


def warn_of_skipped(skipped: Sequence[SkippedTask]) -> None:
    """Print a warning for each task that is left out; for the tasks of a group one together."""
    groups: dict[str, list[SkippedTask]] = {}
    for skip in skipped:
        if skip.group:
            groups.setdefault(skip.group, []).append(skip)
        else:
            warn(f"The task `{skip.task}` is left out of the averages. {skip.reason}")
    for group, own in groups.items():
        names = listing((skip.task.removeprefix(f"{group}/") for skip in own), limit=6)
        warn(
            f"{len(own)} tasks are left out of the average of `{group}` for want of data: {names}. The result "
            f"names each with its reason; the first: {own[0].reason}"
        )


def warn_of_left_out(left_out: Sequence[LeftOut]) -> None:
    """Print a warning for questions that the data holds and the suite does not know.

    Questions that are shown as worked examples belong to how a suite is made; the result counts them.
    """
    for one in left_out:
        if not one.reason.startswith("shown"):
            warn(f"{one.number} records of `{one.task}` are left out: {one.reason}.")


def _load_listed(config: SuiteConfig, data_dir: Path | None) -> Loaded:
    tasks: list[Task] = []
    skipped: list[SkippedTask] = []
    groups: list[HarnessGroup] = []
    own = None if config.lm_eval_tasks is None else Path(config.lm_eval_tasks)
    for task in config.listed:
        if task.of_harness:
            groups.append(load_harness_group(task.name, own=own))
            skipped += groups[-1].skipped
            continue
        try:
            tasks += [load_task(single, data_dir=data_dir) for single in expand([task])]
        except AbsentDataError as error:
            if not task.optional:
                raise _with_way_out(task, error) from error
            skipped.append(SkippedTask(task=task.identity, reason=str(error)))
    if not tasks and not any(group.tasks for group in groups):
        raise DataError(
            f"A suite needs data for at least one task, but has it for none of {len(skipped)}: "
            + " ".join(skip.reason for skip in skipped[:3])
        )
    _check_names([*(task.name for task in tasks), *(name for one in groups for name in one.tasks)])
    if tasks:
        check_limit(len(tasks), config.limit)
    for group in groups:
        check_limit(len(group.tasks), config.limit, group=group.name)
    kept = tuple(group for group in groups if group.tasks)
    return Loaded(tasks=tuple(tasks), harness=kept, skipped=tuple(skipped))


def _with_way_out(task: SuiteTask, error: AbsentDataError) -> DataError:
    """Say that lm-eval has a task of this name, where it has."""
    if "/" in task.name or "." in task.name or not harness_knows(task.name):
        return error
    return DataError(
        f"{error} lm-eval has a task of this name, with data of its own: `{HARNESS_PREFIX}{task.name}`."
    )


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"A suite must hold each task once, but {listing(twice)} comes twice. Take one out."
        )
