"""How much data there is and how long its examples are, task by task; what `flanmoe data stats` does."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flanmoe.core.console import Advance, progress
from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Example
from flanmoe.data.mixture import Mixture
from flanmoe.data.renderers.template import NoExemplarError
from flanmoe.data.statistics import Bin, Length, Lengths, Summary, histogram, length_of, summary
from flanmoe.data.tasks import Task
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.evaluation.suites import shares as even_shares
from flanmoe.stages.held_model import HeldModel
from flanmoe.study.data_groups import DataGroup


@dataclass(frozen=True, slots=True)
class TaskStatistics:
    """One task of a group.

    Attributes:
        examples: all that it has.
        rejected: records that cannot be read.
        measured: examples whose lengths were taken, a sample where a limit is below `examples`.
        without_exemplars: few-shot samples that were left out because no exemplar fits before them.
        rate: what the file says; None where it says nothing.
        group: tasks of one group share their rate; None for a task that has it alone.
        share: share of the draws that this gives; None where nothing is tuned.
        token_share: expected share of the tuned tokens, from the mean length.
        asked: questions that an evaluation asks, where it has a limit; all of them elsewhere.
        lengths: figures by what is measured: prompt, response or both, in characters or tokens.
        histogram: examples by their tokens.
        longer: measured examples with more tokens than a row; None where nothing is packed.
    """

    examples: int
    rejected: int
    measured: int
    without_exemplars: int
    rate: float | None
    group: str | None
    share: float | None
    token_share: float | None
    asked: int | None
    lengths: dict[str, Summary | None]
    histogram: tuple[Bin, ...]
    longer: int | None

    @property
    def is_sample(self) -> bool:
        """Whether some examples were not measured because of a limit."""
        return self.measured + self.without_exemplars < self.examples

    @property
    def tokens(self) -> float:
        """Tokens of all examples together, from the mean of those measured."""
        found = self.lengths["tokens"]
        return 0.0 if found is None else found.mean * self.examples


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """All tasks of a group, and those that have to be left out, with the reason."""

    group: DataGroup
    tasks: dict[str, TaskStatistics]
    left_out: dict[str, str]

    def totals(self) -> dict[str, Any]:
        """Return the sums over the tasks."""
        tasks = self.tasks.values()
        longer = [task.longer for task in tasks if task.longer is not None]
        asked = [task.asked for task in tasks if task.asked is not None]
        return {
            "examples": sum(task.examples for task in tasks),
            "rejected": sum(task.rejected for task in tasks),
            "measured": sum(task.measured for task in tasks),
            "longer": sum(longer) if longer else None,
            "asked": sum(asked) if asked else None,
            "tokens": round(sum(task.tokens for task in tasks)),
            "is_sample": any(task.is_sample for task in tasks),
        }

    def to_mapping(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "use": self.group.use,
            "where": list(self.group.where),
            "model": self.group.model,
            "packing_length": self.group.packing_length,
            "tasks": {name: _task_mapping(task) for name, task in self.tasks.items()},
            "left_out": self.left_out,
            "totals": self.totals(),
        }


def _task_mapping(task: TaskStatistics) -> dict[str, Any]:
    values = asdict(task)
    lengths = values.pop("lengths")
    return {**values, **lengths, "is_sample": task.is_sample}


def statistics_of(
    groups: Sequence[DataGroup], *, limit: int | None, data_dir: Path | None
) -> list[GroupStatistics]:
    """Count and measure the tasks of some groups.

    Args:
        groups: what to look at; a task that stands in several is measured once a tokenizer.
        limit: most examples of a task whose lengths are taken, drawn from a fixed seed; None for all.
        data_dir: the data folder.

    Raises:
        DataError: if a task is not known or cannot be read, or a sample cannot be rendered.
        ConfigError: if a mixture or a suite contradicts itself.
    """
    measuring = _Measuring(limit)
    return [_group_statistics(group, measuring, data_dir) for group in groups]


def _group_statistics(
    group: DataGroup, measuring: "_Measuring", data_dir: Path | None
) -> GroupStatistics:
    tasks, skipped = group.load(data_dir)
    shares = _shares(group, tasks)
    lengths = measuring.lengths(tasks, group.model)
    total = sum(shares.get(task.name, 0.0) * _mean_tokens(lengths[task.name]) for task in tasks)
    asked = _asked(group, tasks)
    found: dict[str, TaskStatistics] = {}
    for task in tasks:
        measured = lengths[task.name]
        share = shares.get(task.name)
        weight = None if share is None else share * _mean_tokens(measured)
        found[task.name] = TaskStatistics(
            examples=task.size,
            rejected=len(task.rejected),
            measured=len(measured.tokens),
            without_exemplars=measuring.num_rows(task) - len(measured.tokens),
            rate=task.config.rate,
            group=task.config.group,
            share=share,
            token_share=weight / total if weight is not None and total else None,
            asked=asked.get(task.name),
            lengths=_summaries(measured),
            histogram=histogram(measured.tokens),
            longer=_num_longer(measured, group.packing_length),
        )
    return GroupStatistics(group, found, {skip.task: skip.reason for skip in skipped})


class _Measuring:
    """Lengths of tasks, each task taken once with a tokenizer."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._tokenizers: dict[str, Tokenizer] = {}
        self._known: dict[tuple[str, str], Lengths] = {}

    def num_rows(self, task: Task) -> int:
        """Return how many examples of a task are looked at."""
        return task.size if self._limit is None else min(task.size, self._limit)

    def lengths(self, tasks: Sequence[Task], model: str) -> dict[str, Lengths]:
        """Return the lengths of tasks as a model's tokenizer counts them."""
        if model not in self._tokenizers:
            self._tokenizers[model] = HeldModel(model).text_tokenizer()
        # What a task is drawn by does not change its texts.
        keys = {
            task.name: (model, task.config.model_copy(update={"rate": None, "cap": None}).to_yaml())
            for task in tasks
        }
        new = [task for task in tasks if keys[task.name] not in self._known]
        total = sum(map(self.num_rows, new))
        with progress("measuring", total=total, unit="examples") as advance:
            for task in new:
                found = self._found(task, self._tokenizers[model], advance)
                self._known[keys[task.name]] = Lengths.of(found)
        return {name: self._known[key] for name, key in keys.items()}

    def _found(self, task: Task, tokenizer: Tokenizer, advance: Advance) -> Iterator[Length]:
        for example in sample(task.examples, self._limit, task.name):
            advance(note=task.name)
            # Drawn to follow exemplars of which none fits, a sample is left out of training too.
            with suppress(NoExemplarError):
                rendered = render_chat(example, task.renderer, tokenizer, task.name)
                yield length_of(rendered, tokenizer)


def sample(examples: Sequence[Example], limit: int | None, task: str) -> Iterator[Example]:
    """Yield examples in order; with a limit below their number so many of them, for a task always the same."""
    if limit is None or limit >= len(examples):
        yield from examples
        return
    order = SeedTree(0).child("sample").child(task).numpy().permutation(len(examples))
    for row in np.sort(order[:limit]).tolist():
        yield examples[row]


def _shares(group: DataGroup, tasks: Sequence[Task]) -> dict[str, float]:
    """Return the share of the draws of each task that is tuned on."""
    if group.mixture is None:
        return {}
    return Mixture(
        tasks,
        seeds=SeedTree(0),
        temperature=group.mixture.temperature,
        maximum_per_task=group.mixture.maximum_per_task,
    ).rates


def _asked(group: DataGroup, tasks: Sequence[Task]) -> dict[str, int]:
    """Return how many questions of each task an evaluation asks."""
    if group.suite is None:
        return {}
    sizes = [task.size for task in tasks]
    limit = group.suite.limit
    counts = sizes if limit is None else even_shares(sizes, limit)
    return {task.name: count for task, count in zip(tasks, counts, strict=True)}


def _summaries(lengths: Lengths) -> dict[str, Summary | None]:
    return {
        "tokens": summary(lengths.tokens),
        "prompt_tokens": summary(lengths.prompt_tokens),
        "response_tokens": summary(lengths.response_tokens),
        "prompt_characters": summary(lengths.prompt_characters),
        "response_characters": summary(lengths.response_characters),
    }


def _num_longer(lengths: Lengths, packing_length: int | None) -> int | None:
    return None if packing_length is None else int((lengths.tokens > packing_length).sum())


def _mean_tokens(lengths: Lengths) -> float:
    found = summary(lengths.tokens)
    return 0.0 if found is None else found.mean
