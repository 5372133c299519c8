"""Suites: named evaluation tasks, run through lm-eval over one model."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.config import Config
from flanmoe.core.console import Advance, progress, warn
from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.core.rundir import versions
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example
from flanmoe.data.sources.finding import AbsentDataError
from flanmoe.data.tasks import Task, TaskConfig, expand, load_task
from flanmoe.evaluation.averages import average
from flanmoe.evaluation.lm import HeldOutLM, Precision, build_lm, quiet_lm_eval
from flanmoe.evaluation.lm_task import HeldOutTask
from flanmoe.evaluation.model_hash import model_hash
from flanmoe.evaluation.results import ExampleRecord, SkippedTask, SuiteResult
from flanmoe.models.modes import evaluating


class SuiteTask(TaskConfig):
    """A task to score on.

    Attributes:
        optional: leave the task out, and say so in the result, where its folder or file is not there
            at all. Any other mistake, such as an unknown split or exemplar task, stays an error.
    """

    optional: bool = False


class SuiteConfig(Config):
    """Which tasks a model is scored on, and how.

    Attributes:
        tasks: the tasks; each a mapping, or just its name. `family/*` stands for all tasks of
            a family.
        limit: most examples in all, the same share of every task; a task that has fewer leaves the
            rest to the others. Which ones is drawn from the seed, and a larger limit keeps those of
            a smaller one. Without it every example is used.
        batch_size: most texts in one forward pass.
        precision: `float32` computes in the type of the weights, `bfloat16` under autocast.
    """

    tasks: tuple[SuiteTask, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    precision: Precision = "float32"


# Tasks that flanmoe itself never trains on: the authors of BIG-bench ask that nobody does.
_SUITES: Mapping[str, tuple[str, ...]] = {"held-out": ("exemplars/bbh/*",)}


def named_suite(name: str) -> tuple[SuiteTask, ...]:
    """Return the tasks of a suite that flanmoe knows by name.

    Raises:
        ConfigError: if no suite is called that; names the nearest one.
    """
    if name not in _SUITES:
        raise ConfigError(
            f"The suite `{name}` is not known.{nearest_name_hint(name, _SUITES)} "
            f"Known: {listing(_SUITES)}."
        )
    return tuple(SuiteTask(name=task) for task in _SUITES[name])


def evaluate_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SuiteConfig,
    *,
    data_dir: Path | None,
    seeds: SeedTree,
    training_hashes: frozenset[str] = frozenset(),
) -> SuiteResult:
    """Score a model on the tasks of a suite.

    An optional task without data is left out with a warning; the result names it and is marked partial.

    Args:
        model: a causal language model, dense or sparse; its mode and weights are as
            before afterwards.
        tokenizer: its fast tokenizer.
        config: the suite.
        data_dir: the data folder; without it FLANMOE_DATA.
        seeds: where the draw of a limited suite comes from. Results compare only for
            the same seeds.
        training_hashes: content hashes of what the model was trained on (`read_training_hashes`).

    Raises:
        DataError: if a task that is not optional is not known, no task has data, or a record cannot
            be read.
        ConfigError: if a task comes twice, or the limit leaves a task without an example.
        ModelError: if the model's likelihoods are no numbers.
    """
    tasks, skipped = load_suite(config, data_dir=data_dir)
    warn_of_skipped(skipped)
    return evaluate_tasks(
        model,
        tokenizer,
        tasks,
        config=config,
        seeds=seeds,
        training_hashes=training_hashes,
        skipped=skipped,
    )


def load_suite(
    config: SuiteConfig, *, data_dir: Path | None
) -> tuple[list[Task], list[SkippedTask]]:
    """Return the tasks that have data, and the optional ones that have none with the reason.

    Prints nothing: a suite is loaded to be planned and again to be scored (see `warn_of_skipped`).

    Raises:
        DataError: if a task that is not optional is not known, or no task has data.
        ConfigError: if a task comes twice, or the limit leaves a task without an example.
    """
    tasks: list[Task] = []
    skipped: list[SkippedTask] = []
    for task in config.tasks:
        try:
            tasks += [load_task(single, data_dir=data_dir) for single in expand([task])]
        except AbsentDataError as error:
            if not task.optional:
                raise
            skipped.append(SkippedTask(task=task.identity, reason=str(error)))
    if not tasks:
        raise DataError(
            f"A suite needs data for at least one task, but has it for none of {len(skipped)}: "
            + " ".join(skip.reason for skip in skipped[:3])
        )
    _check_names(tasks)
    _check_limit(tasks, config.limit)
    return tasks, skipped


def warn_of_skipped(skipped: Sequence[SkippedTask]) -> None:
    """Print one warning for each task that is left out."""
    for skip in skipped:
        warn(f"The task `{skip.task}` is left out of the averages. {skip.reason}")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    config: SuiteConfig,
    seeds: SeedTree,
    training_hashes: frozenset[str] = frozenset(),
    skipped: Sequence[SkippedTask] = (),
) -> SuiteResult:
    """Score a model on loaded tasks; `config.tasks` is not looked at. See `evaluate_suite`.

    `skipped` names the tasks that had to be left out (see `load_suite`).
    """
    chosen = limited(tasks, config.limit, seeds=seeds)
    with evaluating(model), quiet_lm_eval():
        start = time.monotonic()
        lm = build_lm(model, tokenizer, batch_size=config.batch_size, precision=config.precision)
        held_out = _held_out(tasks, chosen, lm, training_hashes)
        records = run(lm, held_out)
        seconds = time.monotonic() - start
    averages = average(records, {task.name: task.cluster for task in tasks})
    return SuiteResult(
        tasks=averages.tasks,
        skipped=tuple(skipped),
        pooled=averages.pooled,
        macro=averages.macro,
        clusters=averages.clusters,
        only_seen=averages.only_seen,
        num_examples=len(records),
        num_seen=sum(record.seen for record in records),
        num_truncated=sum(record.truncated for record in records),
        seconds=seconds,
        tokens=lm.work.real_tokens,
        padding_tokens=lm.work.padding_tokens,
        model_hash=model_hash(model),
        settings={**config.to_mapping(), "seed": seeds.root},
        versions=versions(),
        examples=tuple(records),
    )


def _held_out(
    tasks: Sequence[Task],
    chosen: Sequence[Sequence[Example]],
    lm: HeldOutLM,
    training_hashes: frozenset[str],
) -> dict[str, HeldOutTask]:
    held_out: dict[str, HeldOutTask] = {}
    with progress("tokenising", total=sum(map(len, chosen)), unit="examples") as advance:
        for task, examples in zip(tasks, chosen, strict=True):
            held_out[task.name] = HeldOutTask(
                task,
                _counted(examples, advance, note=task.name),
                tokenizer=lm.tokenizer,
                encode=lm.encode,
                training_hashes=training_hashes,
            )
    return held_out


def _counted(examples: Sequence[Example], advance: Advance, *, note: str) -> Iterator[Example]:
    for example in examples:
        yield example
        advance(note=note)


def run(lm: HeldOutLM, tasks: Mapping[str, HeldOutTask]) -> list[ExampleRecord]:
    """Let lm-eval evaluate the tasks; return a record of every example, task by task."""
    found: Any = evaluate(
        lm=lm,
        task_dict={"tasks": dict(tasks), "groups": {}, "group_map": {}},
        # Standard errors are ours, over examples and over tasks.
        bootstrap_iters=0,
        log_samples=True,
    )
    return [
        tasks[name].record(sample["doc"], sample["filtered_resps"])
        for name in tasks
        for sample in found["samples"][name]
    ]


def limited(tasks: Sequence[Task], limit: int | None, *, seeds: SeedTree) -> list[list[Example]]:
    """Return the examples of each task that a limited suite uses, in the order of the task.

    Raises:
        ConfigError: if the limit is below the number of tasks.
    """
    if limit is None:
        return [list(task.examples) for task in tasks]
    _check_limit(tasks, limit)
    counts = shares([task.size for task in tasks], limit)
    return [
        [task.examples[index] for index in _drawn(task, count, seeds)]
        for task, count in zip(tasks, counts, strict=True)
    ]


def shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Share `limit` out evenly: what a small task cannot use goes to the others, larger ones first.

    No share is larger than its size; shares below their size differ by at most one; none shrinks
    when the limit grows.
    """
    counts = [0] * len(sizes)
    left = limit
    for place, index in enumerate(sorted(range(len(sizes)), key=lambda index: sizes[index])):
        counts[index] = min(sizes[index], left // (len(sizes) - place))
        left -= counts[index]
    return counts


def _drawn(task: Task, count: int, seeds: SeedTree) -> list[int]:
    # The head of one fixed order, so that a larger limit keeps the examples of a smaller one.
    order = seeds.child("limit").child(task.name).numpy().permutation(task.size)
    return np.sort(order[:count]).tolist()


def _check_names(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"A suite must hold each task once, but {listing(twice)} comes twice. Take one out."
        )


def _check_limit(tasks: Sequence[Task], limit: int | None) -> None:
    if limit is not None and limit < len(tasks):
        raise ConfigError(
            f"`limit` must be at least one example for each of the {len(tasks)} tasks, but is {limit}. "
            "Raise it, or name fewer tasks."
        )
