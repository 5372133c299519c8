"""The data that a name on the command line stands for: one task, or all that a recipe or a study uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flanmoe.core.errors import DataError
from flanmoe.data.mixture import MixtureConfig, mixed_tasks
from flanmoe.data.sources.finding import DEFAULT_SPLIT
from flanmoe.data.tasks import Task, TaskConfig, load_tasks
from flanmoe.evaluation.results import SkippedTask
from flanmoe.evaluation.suites import SuiteConfig, load_suite
from flanmoe.stages.recipe import EvaluateStage, TuneStage
from flanmoe.stages.task_names import named_tasks
from flanmoe.study.study import Arm, Study
from flanmoe.study.study_file import load_study

Use = Literal["named", "tuned", "evaluated"]


@dataclass(frozen=True, slots=True)
class DataGroup:
    """Tasks that are used together. Their bad records are listed, whatever the file says of them.

    Attributes:
        use: what for; `named` where only a task is named and nothing is said of its use.
        model: whose tokenizer reads them.
        where: arm and label of every stage that uses them (`dense/tune`).
        packing_length: tokens in a row; None for what is evaluated.
        tasks: the named ones; a family stands for all of its own.
        mixture: what is tuned on, with its rates.
        suite: what is scored on, with its limit.
    """

    use: Use
    model: str
    where: tuple[str, ...] = ()
    packing_length: int | None = None
    tasks: tuple[TaskConfig, ...] = ()
    mixture: MixtureConfig | None = None
    suite: SuiteConfig | None = None

    @property
    def title(self) -> str:
        """One line that says which group this is."""
        used = f"{self.use} in {', '.join(self.where)}; " if self.where else ""
        return f"{used}tokens of {self.model}"

    @property
    def configs(self) -> tuple[TaskConfig, ...]:
        """The tasks that the group names itself, unexpanded."""
        if self.mixture is not None:
            return self.mixture.tasks
        return self.tasks if self.suite is None else self.suite.tasks

    def load(self, data_dir: Path | None) -> tuple[list[Task], list[SkippedTask]]:
        """Find the tasks; and the optional ones that are not there.

        Raises:
            DataError: if a task is not known, or nothing is left.
            ConfigError: if the mixture or the suite contradicts itself.
        """
        if self.mixture is not None:
            return mixed_tasks(self.mixture, data_dir=data_dir), []
        if self.suite is not None:
            return load_suite(self.suite, data_dir=data_dir)
        return load_tasks(self.tasks, data_dir=data_dir), []


def group_of_task(
    name: str, *, split: str | None, model: str, packing_length: int | None = None
) -> DataGroup:
    """Return the group of a task, or of all tasks of a family.

    Raises:
        ConfigError: if a split is asked for, and the task has none to choose from.
    """
    tasks = named_tasks([name], split=split, default_split=DEFAULT_SPLIT)
    return DataGroup("named", model, packing_length=packing_length, tasks=_lenient(tasks))


def groups_of_file(path: Path) -> tuple[DataGroup, ...]:
    """Return what a recipe or a study tunes on, then what it scores on; arms that share it are one group.

    Raises:
        ConfigError: if the file is not valid.
        DataError: if it neither tunes nor evaluates.
    """
    groups = _merged(_groups(load_study(path)))
    if not groups:
        raise DataError(
            f"The file {path} needs a `tune` or an `evaluate` stage to have data, but has neither."
        )
    return tuple(sorted(groups, key=lambda group: group.use == "evaluated"))


def _groups(study: Study) -> list[DataGroup]:
    return [
        group
        for name, arm in study.arms.items()
        for stage in arm.stages
        if (group := _group(stage, _named_model(name, arm), (f"{name}/{stage.label}",))) is not None
    ]


def _named_model(name: str, arm: Arm) -> str:
    """Return the model whose tokenizer counts the tokens of an arm's data."""
    if arm.model is None:
        raise DataError(
            f"Tokens of data are counted with the tokenizer of a model, but arm `{name}` trains one of its own "
            "when it runs. Name its tasks one by one in place of the file, with a `--model`."
        )
    return arm.model


def _group(stage: Any, model: str, where: tuple[str, ...]) -> DataGroup | None:
    if isinstance(stage, TuneStage):
        flan = stage.data.flan2022
        changes = {
            "tasks": _lenient(stage.data.tasks),
            "flan2022": flan and flan.model_copy(update={"on_bad_record": "skip"}),
        }
        mixture = stage.data.model_copy(update=changes)
        length = stage.packing.length
        return DataGroup("tuned", model, where, packing_length=length, mixture=mixture)
    if isinstance(stage, EvaluateStage):
        fields = {key: getattr(stage, key) for key in SuiteConfig.model_fields}
        suite = SuiteConfig(**{**fields, "tasks": _lenient(stage.tasks)})
        return DataGroup("evaluated", model, where, suite=suite)
    return None


def _lenient(tasks: Sequence[TaskConfig]) -> tuple[TaskConfig, ...]:
    # Who looks at data wants to see all bad records, so none stops at the first.
    return tuple(task.model_copy(update={"on_bad_record": "skip"}) for task in tasks)


def _merged(groups: Sequence[DataGroup]) -> list[DataGroup]:
    merged: list[DataGroup] = []
    for group in groups:
        for place, other in enumerate(merged):
            if replace(group, where=other.where) == other:
                merged[place] = replace(other, where=(*other.where, *group.where))
                break
        else:
            merged.append(group)
    return merged
