"""Suites of few-shot tasks as data: which tasks, which prompts, which averages.

What belongs to a suite is said here and not by the data that happens to be there, so that an average over
less than all of it can be marked.
"""

from typing import Literal

from pydantic import Field, model_validator

from flanmoe.core.config import Config
from flanmoe.core.names import listing
from flanmoe.data.tasks import TaskConfig
from flanmoe.evaluation.tasks.few_shot import Mode, PromptStyle


class Part(Config):
    """Examples of a data set: all of them, or those of one of its tasks.

    Attributes:
        source: the data set.
        value: value of the field that tells its tasks apart (`KnownSet.tasks_field`); None for all.
    """

    source: TaskConfig
    value: str | None = None

    @property
    def name(self) -> str:
        """Name of the part, for draws and messages."""
        return self.source.identity + (f"/{self.value}" if self.value else "")


class PromptedTaskConfig(Config):
    """One task of a group.

    Attributes:
        name: within its group.
        questions: what is asked.
        exemplars: where worked examples come from, None for none.
        drawn: whether they are drawn with a fixed seed; otherwise they are the first of their data set.
        description: what stands above them; None for the description that comes with them.
        style: how questions and answers are written.
        chance: share that guessing gets right, between 0 and 1.
        part_of: the task that this is one part of; parts are averaged first and then count as one task.
    """

    name: str
    questions: Part
    exemplars: Part | None = None
    drawn: bool = False
    description: str | None = ""
    style: PromptStyle = PromptStyle()
    chance: float = Field(ge=0, lt=1)
    part_of: str | None = None


class PromptedGroup(Config):
    """Tasks that are asked alike, limited together, and averaged with equal weights.

    Attributes:
        name: of the group; its tasks are called `name/task` in results.
        title: the same in words.
        mode: whether answers are asked for alone or behind a chain of thought.
        shots: worked examples before each question; fewer where a task has fewer.
        held: `in` where the published training data covers the group, `out` where not.
        tasks: what belongs to it, whether there is data for it or not.
    """

    name: str
    title: str
    mode: Mode
    shots: int = Field(ge=0)
    held: Literal["in", "out"]
    tasks: tuple[PromptedTaskConfig, ...] = Field(min_length=1)

    @property
    def num_tasks(self) -> int:
        """Tasks that the average is over; parts of one task count once."""
        return len({task.part_of or task.name for task in self.tasks})


class PromptedSuite(Config):
    """Groups of few-shot tasks, and the groups whose normalised scores are averaged.

    Attributes:
        name: of the suite.
        groups: in the order of the report.
        averaged: names of the groups in the normalised average; empty for no such average.
    """

    name: str
    groups: tuple[PromptedGroup, ...] = Field(min_length=1)
    averaged: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _averages_its_groups(self) -> "PromptedSuite":
        unknown = set(self.averaged) - {group.name for group in self.groups}
        if unknown:
            raise ValueError(
                f"`averaged` must name groups of the suite, but found {listing(unknown)}"
            )
        return self
