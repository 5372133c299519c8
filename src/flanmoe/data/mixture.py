"""A mixture: tasks with rates, and the draw that turns an index into an example.

Rates follow examples-proportional mixing with a cap and a temperature (Raffel et al., 2020, section
3.5.2; Wei et al., 2022): task i is drawn with probability proportional to
min(size_i, cap_i) ** (1 / temperature).
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from pydantic import Field, field_validator, model_validator

from flanmoe.core.config import Config
from flanmoe.core.console import warn
from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.core.seeds import SeedTree
from flanmoe.data.contamination import EvaluationIndex, overlapping_rows
from flanmoe.data.example import Example
from flanmoe.data.flan2022 import Flan2022, flan2022_tasks
from flanmoe.data.renderers.template import TemplateConfig
from flanmoe.data.sources.base import EVALUATION_ONLY_REASON
from flanmoe.data.tasks import Task, TaskConfig, load_tasks, worded


class MixtureConfig(Config):
    """What is trained on, and how much of each.

    Attributes:
        tasks: the tasks; each a mapping, or just its name.
        template: wordings of every task in `tasks` that has neither a template nor a renderer of its own.
        flan2022: the mixture of FLAN 2022 over whatever of its tasks the data folder holds; in place of
            `tasks`, or beside tasks that have rates.
        held_out: clusters, or names of tasks, that are left out of what the rest names.
        without_overlap_of: evaluated tasks. Examples that share a text, or 13 words in a row, with one of
            theirs are left out of training and counted (see `flanmoe.data.contamination`).
        temperature: 1 keeps the rates as they are, larger values even them out.
        maximum_per_task: cap on the size that a task counts with, where the task sets no cap of its
            own. It limits the rate only: every example is still drawn once an epoch.
    """

    # Before `tasks`, which are checked with it in hand.
    template: TemplateConfig | None = None
    tasks: tuple[TaskConfig, ...] = ()
    flan2022: Flan2022 | None = None
    held_out: tuple[str, ...] = ()
    without_overlap_of: tuple[TaskConfig, ...] = ()
    temperature: float = Field(default=1.0, gt=0)
    maximum_per_task: int | None = Field(default=None, ge=1)

    # `info` is pydantic's `ValidationInfo`, a protocol that nothing can be checked against when it runs.
    @field_validator("tasks")
    @classmethod
    def _tasks_have_the_template(
        cls, value: tuple[TaskConfig, ...], info: Any
    ) -> tuple[TaskConfig, ...]:
        return tuple(worded(task, info.data.get("template")) for task in value)

    @model_validator(mode="after")
    def _something_is_drawn(self) -> "MixtureConfig":
        if not self.tasks and self.flan2022 is None:
            raise ValueError(
                "must hold at least 1 entry in `tasks`, or `flan2022`, but found neither"
            )
        return self

    @model_validator(mode="after")
    def _held_in_or_held_out(self) -> "MixtureConfig":
        named = {task.name for task in self.tasks} | {task.identity for task in self.tasks}
        both = sorted(named.intersection(self.held_out))
        if both:
            raise ValueError(
                f"a task is either trained on or held out, but {listing(both)} stands in `tasks` and in "
                "`held_out`; take it out of one"
            )
        return self


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw from a mixture.

    Attributes:
        task: position of the task in `Mixture.tasks`.
        epoch: how often the task had been gone through before.
        row: position of the example in the task.
    """

    task: int
    epoch: int
    row: int


class _OpenTasks:
    """The tasks that are drawn, as limits between 0 and 1."""

    def __init__(
        self, rates: Sequence[tuple[str, float]], used_up: frozenset[str] = frozenset()
    ) -> None:
        still = [(i, rate) for i, (name, rate) in enumerate(rates) if name not in used_up]
        if not still:
            raise DataError(
                f"Every task of the mixture has used up its budget of tokens ({listing(sorted(used_up))}), and "
                "there is more to train. Raise `max_tokens`, or train for fewer steps."
            )
        total = sum(rate for _, rate in still) if used_up else 1.0
        self._positions = [position for position, _ in still]
        self._limits = list(accumulate(rate / total for _, rate in still))

    def at(self, point: float) -> int:
        """Return the position of the task whose span holds a point."""
        return self._positions[min(bisect_right(self._limits, point), len(self._positions) - 1)]


class Mixture:
    """Tasks with rates that sum to 1.

    Args:
        tasks: loaded tasks, each name once.
        seeds: the branch of the seed tree that all draws come from.
        temperature: see `MixtureConfig`.
        maximum_per_task: see `MixtureConfig`.

    Raises:
        DataError: if a task may only be evaluated on.
        ConfigError: if a name comes twice, or some tasks have a rate and others none.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seeds: SeedTree,
        temperature: float = 1.0,
        maximum_per_task: int | None = None,
    ) -> None:
        _check_trainable(tasks)
        _check_names(tasks)
        self.tasks = tuple(tasks)
        self._seeds = seeds
        weights = _weights(self.tasks, maximum_per_task)
        tempered = [weight ** (1.0 / temperature) for weight in weights]
        total = sum(tempered)
        self.rates: dict[str, float] = {
            task.name: weight / total for task, weight in zip(self.tasks, tempered, strict=True)
        }
        self._open_tasks = {frozenset[str](): _OpenTasks(tuple(self.rates.items()))}
        self._orders: dict[int, tuple[int, Int[np.ndarray, " N"]]] = {}

    @classmethod
    def load(
        cls, config: MixtureConfig, *, seeds: SeedTree, data_dir: Path | None = None
    ) -> "Mixture":
        """Load the tasks of a config (`family/*` becomes all tasks of the family) and mix them.

        Raises:
            DataError: if a task cannot be read, or may only be evaluated on.
            ConfigError: see the class.
        """
        return cls(
            mixed_tasks(config, data_dir=data_dir),
            seeds=seeds,
            temperature=config.temperature,
            maximum_per_task=config.maximum_per_task,
        )

    @property
    def num_examples(self) -> int:
        """Examples of all tasks together."""
        return sum(task.size for task in self.tasks)

    def draw(
        self, index: int, *, counts: Mapping[str, int], used_up: frozenset[str] = frozenset()
    ) -> Draw:
        """Return the `index`-th draw: a function of the seed, the index and the counts,
        of nothing else.

        The task follows from the index. Within a task each epoch is a seeded permutation, so that
        every example is drawn once before any is drawn again.

        Args:
            index: number of the draw, from 0.
            counts: draws of each task before this one.
            used_up: names of tasks that are drawn no more; the others share their rate.

        Raises:
            DataError: if every task is used up.
        """
        point = self._seeds.child("draw", index).integer() / 2**63
        position = self._open(used_up).at(point)
        task = self.tasks[position]
        epoch, place = divmod(counts.get(task.name, 0), task.size)
        row = int(self._order(position, epoch)[place])
        return Draw(task=position, epoch=epoch, row=row)

    def _open(self, used_up: frozenset[str]) -> "_OpenTasks":
        if used_up not in self._open_tasks:
            self._open_tasks[used_up] = _OpenTasks(tuple(self.rates.items()), used_up)
        return self._open_tasks[used_up]

    def example(self, draw: Draw) -> Example:
        """Return the drawn example."""
        return self.tasks[draw.task].examples[draw.row]

    def content_hash(self, draw: Draw) -> str:
        """Return the content hash of the drawn example, without reading it."""
        return self.tasks[draw.task].content_hashes[draw.row]

    def sample_seeds(self, draw: Draw) -> SeedTree:
        """Return the seeds of a draw's rendering: a function of seed, task, epoch and row only."""
        task = self.tasks[draw.task]
        return self._seeds.child("sample").child(task.name, draw.epoch).child("row", draw.row)

    def times_drawn(self, counts: Mapping[str, int]) -> Iterator[tuple[Draw, int]]:
        """Yield a draw of each example drawn so far, and how often it was."""
        for position, task in enumerate(self.tasks):
            epochs, rest = divmod(counts.get(task.name, 0), task.size)
            again = set(self._order(position, epochs)[:rest].tolist())
            for row in range(task.size) if epochs else sorted(again):
                yield Draw(task=position, epoch=0, row=row), epochs + (row in again)

    def drawn_hashes(self, counts: Mapping[str, int]) -> frozenset[str]:
        """Return the content hashes of all examples drawn when tasks have been drawn this often."""
        return frozenset(self.content_hash(draw) for draw, _ in self.times_drawn(counts))

    def _order(self, position: int, epoch: int) -> Int[np.ndarray, " N"]:
        kept = self._orders.get(position)
        if kept is None or kept[0] != epoch:
            task = self.tasks[position]
            branch = self._seeds.child("order").child(task.name, epoch)
            kept = (epoch, branch.numpy().permutation(task.size))
            self._orders[position] = kept
        return kept[1]


def mixed_tasks(config: MixtureConfig, *, data_dir: Path | None = None) -> list[Task]:
    """Load what a mixture is drawn from: its tasks and FLAN's, without what is held out.

    Raises:
        DataError: if a task cannot be found, or nothing is left.
        ConfigError: if `held_out` names what none of them is.
    """
    configs = list(config.tasks)
    if config.flan2022 is not None:
        found = flan2022_tasks(config.flan2022, data_dir)
        configs += found.tasks
        if found.absent:
            warn(
                f"Of FLAN 2022 the data folder holds nothing of {listing(found.absent)}; the other "
                "sub-mixtures share its rate."
            )
    tasks = load_tasks(configs, data_dir=data_dir)
    kept = _without_held_out(tasks, config.held_out)
    if not kept:
        raise DataError(f"The mixture has no task left: `held_out` takes out all {len(tasks)}.")
    return _without_overlap(kept, load_tasks(config.without_overlap_of, data_dir=data_dir))


def _without_overlap(tasks: Sequence[Task], evaluated: Sequence[Task]) -> list[Task]:
    if not evaluated:
        return list(tasks)
    index = EvaluationIndex.of({task.name: task.examples for task in evaluated})
    return [task.without(overlapping_rows(task.examples, index)) for task in tasks]


def _without_held_out(tasks: Sequence[Task], held_out: Sequence[str]) -> list[Task]:
    kept = list(tasks)
    for name in held_out:
        matched = [task for task in tasks if name in (task.cluster, task.name, task.config.name)]
        if not matched:
            known = sorted({known for task in tasks for known in (task.cluster, task.config.name)})
            raise ConfigError(
                f"`held_out` must name clusters or tasks of the mixture, but `{name}` is neither."
                f"{nearest_name_hint(name, known)} Known: {listing(known)}."
            )
        kept = [task for task in kept if task not in matched]
    return kept


def _check_trainable(tasks: Sequence[Task]) -> None:
    for task in tasks:
        if task.evaluation_only:
            raise DataError(
                f"Task `{task.name}` is for evaluation only and cannot be in a training mixture: "
                f"{EVALUATION_ONLY_REASON} Take it out of the mixture; a suite may hold it."
            )


def _check_names(tasks: Sequence[Task]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ConfigError(
                f"A mixture must hold each task once, but `{task.name}` comes twice. Take one "
                "out, or give it another split or renderer."
            )
        seen.add(task.name)


def _weights(tasks: Sequence[Task], maximum: int | None) -> list[float]:
    given = [task for task in tasks if task.config.rate is not None]
    if not given:
        return [float(_counted_size(task, task.config.cap or maximum)) for task in tasks]
    missing = [task.name for task in tasks if task.config.rate is None]
    if missing:
        raise ConfigError(
            f"Either every task of a mixture has a `rate` or none has, but `{given[0].name}` has "
            f"one and `{missing[0]}` has not. Rates are shares of the draws; sizes are not."
        )
    capped = [task.name for task in tasks if task.config.cap is not None and not task.config.group]
    if maximum is not None or capped:
        raise ConfigError(
            "`cap` and `maximum_per_task` have no effect in a mixture with rates, but are set. "
            "Take them out, or take out the rates."
        )
    return _shared_rates(tasks)


def _counted_size(task: Task, cap: int | None) -> int:
    """The size that a task counts with: no more than its cap, or than the cap of each task in it."""
    field = task.config.cap_by
    if cap is None or task.size <= cap:
        return task.size
    if field is None:
        return cap
    parts = Counter(example.fields.get(field) for example in task.examples)
    if None in parts:
        raise DataError(
            f"The task `{task.name}` is capped by `{field}`, but {parts[None]} of its {task.size} records have "
            "no text of that name. Name another field in `cap_by`, or take it out."
        )
    return sum(min(number, cap) for number in parts.values())


def _shared_rates(tasks: Sequence[Task]) -> list[float]:
    """A rate given to a whole group is shared out among its tasks by their sizes, up to their caps."""
    counted = [_counted_size(task, task.config.cap) for task in tasks]
    totals: Counter[str] = Counter()
    for task, size in zip(tasks, counted, strict=True):
        totals[task.config.group or task.name] += size
    return [
        (task.config.rate or 0.0) * size / totals[task.config.group or task.name]
        for task, size in zip(tasks, counted, strict=True)
    ]
