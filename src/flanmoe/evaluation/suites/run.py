"""Suites over one model, through lm-eval."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.console import Advance, progress
from flanmoe.core.errors import DataError
from flanmoe.core.rundir import versions
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example
from flanmoe.data.tasks import Task
from flanmoe.evaluation.averages import average
from flanmoe.evaluation.lm import Journal, LanguageModel, Listener, build_lm, quiet_lm_eval
from flanmoe.evaluation.lm.work import Spent
from flanmoe.evaluation.results import ExampleRecord, SkippedTask, SuiteResult
from flanmoe.evaluation.suites.choice import Chosen, choose
from flanmoe.evaluation.suites.config import SuiteConfig
from flanmoe.evaluation.suites.coverage import group_coverage, suite_average
from flanmoe.evaluation.suites.loading import (
    Loaded,
    load_evaluation,
    warn_of_left_out,
    warn_of_skipped,
)
from flanmoe.evaluation.suites.plan import EvaluationPlan, planned_groups
from flanmoe.evaluation.tasks.harness import run_harness
from flanmoe.evaluation.tasks.held import HeldTask
from flanmoe.evaluation.tasks.prompted import Asking, PromptedTask
from flanmoe.evaluation.tasks.reference import ReferenceTask
from flanmoe.models.model_hash import model_hash
from flanmoe.models.modes import evaluating

# A chain of thought rarely needs more than the second; the first keeps an evaluation on a CPU within minutes.
NEW_TOKENS_ON_CPU = 128
NEW_TOKENS_ON_ACCELERATOR = 512

Announce = Callable[[EvaluationPlan], None]


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

    Tasks without data are left out with a warning; the result names them and is marked partial.

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
    loaded = load_evaluation(config, data_dir=data_dir)
    warn_of_skipped(loaded.skipped)
    warn_of_left_out(loaded.left_out)
    return evaluate_loaded(
        model, tokenizer, loaded, config=config, seeds=seeds, training_hashes=training_hashes
    )


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
    """Score a model on the reference answers of loaded tasks; `config.tasks` is not looked at.

    `skipped` names the tasks that had to be left out (see `load_suite`). See `evaluate_suite`.
    """
    loaded = Loaded(tasks=tuple(tasks), skipped=tuple(skipped))
    return evaluate_loaded(
        model, tokenizer, loaded, config=config, seeds=seeds, training_hashes=training_hashes
    )


def evaluate_loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: Loaded,
    *,
    config: SuiteConfig,
    seeds: SeedTree,
    training_hashes: frozenset[str] = frozenset(),
    announce: Announce | None = None,
    journal: Path | None = None,
    listener: Listener | None = None,
) -> SuiteResult:
    """Score a model on everything that was loaded; see `evaluate_suite`.

    `announce` is told the plan before anything goes through the model. `journal` is a file that keeps finished
    requests; one that is there already is gone on with. `listener` is told whose token each one of a pass is.

    Raises:
        DataError, ModelError: as `evaluate_suite` does.
        RunError: if the journal belongs to other weights, settings or versions.
    """
    chosen = choose(loaded, config.limit, seeds=seeds)
    if not chosen.num_questions:
        raise DataError("An evaluation needs at least one question, but found 0. Check the data.")
    most = new_tokens_for(model, config)
    settings = {**config.to_mapping(), "max_new_tokens": most, "seed": seeds.root}
    identity = {"model_hash": model_hash(model), "settings": settings, "versions": versions()}
    with (
        evaluating(model),
        quiet_lm_eval(),
        Journal(journal, identity=identity) as finished,
    ):
        start = time.monotonic()
        lm = build_lm(
            model,
            tokenizer,
            batch_size=config.batch_size,
            precision=config.precision,
            capacity_drops=config.capacity_drops,
            journal=finished,
            listener=listener,
        )
        finished.account(spent := partial(_spent, lm, start))
        apart = bool(getattr(model.config, "is_encoder_decoder", False))
        asking = Asking(lm.tokenizer, lm.encode, lm.truncates, most, answers_apart=apart)
        built = _built(chosen, asking, training_hashes)
        if announce is not None:
            announce(_plan(loaded, chosen, built, lm, limit=config.limit, most=most))
        records, metrics = _answered(lm, loaded, chosen, built)
        cost = finished.spent_before + spent()
    return SuiteResult(
        **_averaged(loaded, records),
        **_totals(records, cost),
        shared_tokens=lm.work.shared_tokens,
        harness=metrics,
        skipped=loaded.skipped,
        left_out=loaded.left_out,
        examples=tuple(records),
        **identity,
    )


def _spent(lm: LanguageModel, start: float) -> Spent:
    return Spent.of(lm.work, time.monotonic() - start)


def _totals(records: Sequence[ExampleRecord], cost: Spent) -> dict[str, Any]:
    """Return the fields of a result that count examples, and what they cost."""
    return {
        "num_examples": len(records),
        "num_seen": sum(record.seen for record in records),
        "num_truncated": sum(record.truncated for record in records),
        "seconds": cost.seconds,
        "tokens": cost.real_tokens,
        "padding_tokens": cost.padding_tokens,
        "generated_tokens": cost.generated_tokens,
    }


def new_tokens_for(model: PreTrainedModel, config: SuiteConfig) -> int:
    """Return the most tokens of a chain of thought: as configured, else by where the model is."""
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    return NEW_TOKENS_ON_CPU if model.device.type == "cpu" else NEW_TOKENS_ON_ACCELERATOR


@dataclass(frozen=True, slots=True)
class _Built:
    """Tasks of ours as lm-eval runs them, by name."""

    reference: dict[str, ReferenceTask]
    prompted: dict[str, PromptedTask]

    @property
    def tasks(self) -> dict[str, HeldTask[Any]]:
        """All of them."""
        return {**self.reference, **self.prompted}


def _built(chosen: Chosen, asking: Asking, training_hashes: frozenset[str]) -> _Built:
    total = sum(len(examples) for _, examples in chosen.reference) + sum(
        len(examples) for group in chosen.prompted for _, examples in group.tasks
    )
    reference: dict[str, ReferenceTask] = {}
    prompted: dict[str, PromptedTask] = {}
    with progress("tokenising", total=total, unit="examples") as advance:
        for task, examples in chosen.reference:
            reference[task.name] = ReferenceTask(
                task,
                _counted(examples, advance, note=task.name),
                tokenizer=asking.tokenizer,
                encode=asking.encode,
                training_hashes=training_hashes,
            )
        for group in chosen.prompted:
            for questions, examples in group.tasks:
                prompted[questions.identity] = PromptedTask(
                    questions.identity,
                    _counted(examples, advance, note=questions.identity),
                    shown=questions.shown,
                    asking=asking,
                    chance=questions.config.chance,
                    training_hashes=training_hashes,
                )
    return _Built(reference, prompted)


def _counted(examples: Sequence[Example], advance: Advance, *, note: str) -> Iterator[Example]:
    for example in examples:
        yield example
        advance(note=note)


def _plan(
    loaded: Loaded, chosen: Chosen, built: _Built, lm: Any, *, limit: int | None, most: int
) -> EvaluationPlan:
    tasks: list[Any] = [*built.tasks.values()]
    for task in tasks:
        task.build_all_requests()
    for name, rows in chosen.harness.items():
        harness = next(group.tasks[name] for group in loaded.harness if name in group.tasks)
        harness.build_all_requests(samples=rows, rank=0, world_size=1)
        tasks.append(harness)
    requests = [
        instance
        for task in tasks
        for instance in task.instances
        # Whole texts of lm-eval's tasks come on top.
        if instance.request_type in ("loglikelihood", "generate_until")
    ]
    new_tokens = {name: task.new_tokens for name, task in built.prompted.items()}
    return EvaluationPlan(
        groups=planned_groups(loaded, chosen, new_tokens),
        limit=limit,
        max_new_tokens=most,
        seconds=lm.expected_seconds(requests),
    )


def _answered(
    lm: Any, loaded: Loaded, chosen: Chosen, built: _Built
) -> tuple[list[ExampleRecord], dict[str, dict[str, float]]]:
    records = run(lm, built.tasks) if built.tasks else []
    if not loaded.harness:
        return records, {}
    tasks = {name: task for group in loaded.harness for name, task in group.tasks.items()}
    theirs, metrics = run_harness(lm, tasks, chosen.harness)
    return [*records, *theirs], metrics


def run(lm: Any, tasks: Mapping[str, HeldTask[Any]]) -> list[ExampleRecord]:
    """Let lm-eval evaluate tasks of ours; return a record of every example, task by task."""
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


def _averaged(loaded: Loaded, records: Sequence[ExampleRecord]) -> dict[str, Any]:
    """Return the fields of a result that are averages."""
    clusters = {task.name: task.cluster for task in loaded.tasks}
    parts: dict[str, str] = {}
    for group in () if loaded.prompted is None else loaded.prompted.groups:
        for task in group.tasks:
            clusters[task.identity] = group.config.name
            if task.config.part_of:
                parts[task.identity] = f"{group.config.name}/{task.config.part_of}"
    for harness in loaded.harness:
        clusters |= dict.fromkeys(harness.tasks, harness.name)
    averages = average(records, clusters, parts=parts)
    fields: dict[str, Any] = {
        "tasks": averages.tasks,
        "pooled": averages.pooled,
        "macro": averages.macro,
        "clusters": averages.clusters,
        "only_seen": averages.only_seen,
    }
    if loaded.prompted is None:
        return fields
    suite, groups = loaded.prompted.config, group_coverage(loaded.prompted)
    held = {
        side: found
        for side in ("in", "out")
        if (found := suite_average(suite, averages.clusters, groups, held=side)) is not None
    }
    headline = suite_average(suite, averages.clusters, groups)
    return {**fields, "groups": groups, "normalised_average": headline, "held": held}
