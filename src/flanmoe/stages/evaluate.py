"""The stage `evaluate`: scores of the model in hand on tasks that it is not trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flanmoe.core.config import Config
from flanmoe.core.console import show_table
from flanmoe.core.errors import ConfigError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.tasks import num_rejected
from flanmoe.evaluation.comparison import SuiteComparison, compare_files
from flanmoe.evaluation.metrics import Estimate
from flanmoe.evaluation.results import SuiteResult, write_result
from flanmoe.evaluation.suites import (
    SuiteConfig,
    evaluate_suite,
    evaluate_tasks,
    load_suite,
    named_suite,
)
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import EvaluateStage
from flanmoe.stages.task_names import named_tasks

_DEFAULT_SPLIT = "test"


class EvaluateResult(Config):
    """What an evaluation found; every example's outcome lies beside it.

    Attributes:
        scores: the scores.
        evaluation_only: tasks whose authors ask that nothing is trained on them.
        rejected: records of each task that were left out because they cannot be read.
    """

    scores: SuiteResult
    evaluation_only: tuple[str, ...]
    rejected: dict[str, int]


def run_evaluate(stage: EvaluateStage, held: HeldModel, context: StageContext) -> EvaluateResult:
    """Score the model in hand; every example's outcome goes into the stage's folder."""
    config = SuiteConfig(**{name: getattr(stage, name) for name in SuiteConfig.model_fields})
    # What is left out, the plan has said; the result and the report say it again.
    tasks, skipped = load_suite(config, data_dir=context.data_dir)
    result = evaluate_tasks(
        held.model(),
        held.tokenizer(),
        tasks,
        config=config,
        # The same branch for every label, so that "before" and "after" draw the same questions.
        seeds=context.questions.child("evaluate"),
        training_hashes=held.training_hashes(),
        skipped=skipped,
    )
    write_result(result, context.run.path)
    kept_back = tuple(task.name for task in tasks if task.evaluation_only)
    return EvaluateResult(
        scores=result.summary(), evaluation_only=kept_back, rejected=num_rejected(tasks)
    )


def evaluate_reference(
    reference: str,
    names: Sequence[str],
    *,
    suite: str | None,
    split: str | None,
    settings: Mapping[str, Any],
    data_dir: Path | None,
    out: Path | None,
) -> dict[str, Any]:
    """Score a model on tasks or a named suite; what `flanmoe eval` does.

    Args:
        reference: a known name, a folder or a hub id.
        names: tasks by name.
        suite: a named set of tasks, None for none.
        split: split of the tasks in `names`; None takes `test` where they have splits.
        settings: the other fields of `SuiteConfig`; None stands for the field's default.
        data_dir: data folder, None where none was named.
        out: new folder for the result, None for none.

    Raises:
        ConfigError: if no task is named, the suite is not known, or `split` has no effect.
        RunError: if `out` already holds files.
    """
    if out is not None and out.exists() and any(out.iterdir()):
        raise RunError(
            f"The folder {out} must be empty or new, but already holds files. "
            "Name another one with `--out`."
        )
    given = {name: value for name, value in settings.items() if value is not None}
    config = SuiteConfig.parse(
        {"tasks": _task_configs(names, suite, split), **given}, origin="The command line"
    )
    held = HeldModel(reference)
    result = evaluate_suite(
        held.model(),
        held.tokenizer(),
        config,
        data_dir=data_dir,
        seeds=SeedTree(0).child("evaluate"),
        training_hashes=held.training_hashes(),
    )
    if out is not None:
        write_result(result, out)
    show_table(_score_table(reference, result))
    return {"model": reference, **result.to_mapping()}


def _task_configs(
    names: Sequence[str], suite: str | None, split: str | None
) -> list[dict[str, Any]]:
    if not suite and not names:
        raise ConfigError(
            "An evaluation needs `--suite NAME` or at least one `--task NAME`, but has none."
        )
    if split is not None and not names:
        raise ConfigError(
            f"`--split` must go with `--task NAME`, but the suite `{suite}` brings its own splits. "
            "Leave `--split` out."
        )
    tasks = [
        *(named_suite(suite) if suite else ()),
        *named_tasks(names, split=split, default_split=_DEFAULT_SPLIT),
    ]
    return [task.to_mapping() for task in tasks]


def _score_table(reference: str, result: SuiteResult) -> Table:
    table = Table(title=f"Scores of {reference}")
    for column in ("task", "loss, nats/token", "accuracy", "chance", "examples", "seen"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in result.tasks:
        scores = task.headline
        table.add_row(
            task.task,
            estimate_text(scores.loss),
            estimate_text(scores.accuracy),
            "" if scores.chance is None else f"{scores.chance:.3f}",
            str(task.num_examples),
            str(task.num_seen),
        )
    pooled = result.pooled
    name = "all, without seen ones" if result.num_seen and not result.only_seen else "all"
    table.add_section()
    chance = "" if pooled.chance is None else f"{pooled.chance:.3f}"
    table.add_row(
        name,
        estimate_text(pooled.loss),
        estimate_text(pooled.accuracy),
        chance,
        str(result.num_examples),
        str(result.num_seen),
    )
    return table


def estimate_text(estimate: Estimate | None) -> str:
    """Write a mean with its standard error over examples."""
    if estimate is None:
        return ""
    error = estimate.standard_error
    return f"{estimate.mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def compare_folders(first: Path, second: Path) -> dict[str, Any]:
    """Compare two written results example by example; what `flanmoe eval --compare` does."""
    comparison = compare_files(first, second)
    show_table(_comparison_table(first, second, comparison))
    return comparison.to_mapping()


def _comparison_table(first: Path, second: Path, comparison: SuiteComparison) -> Table:
    table = Table(title=f"{second} minus {first}, paired over {comparison.num_examples} examples")
    for column in ("metric", "difference", "95 % interval", "note"):
        table.add_column(column)
    pooled = comparison.pooled
    for name, row in (("loss, nats/token", pooled.loss), ("accuracy", pooled.accuracy)):
        if row is None:
            continue
        low, high = row.interval or (float("nan"), float("nan"))
        unclear = row.interval is None or low <= 0 <= high
        note = "the interval holds 0: no evidence either way" if unclear else ""
        table.add_row(name, estimate_text(row.difference), f"{low:.4f} to {high:.4f}", note)
    if pooled.mcnemar is not None:
        test = pooled.mcnemar
        table.add_row(
            "McNemar",
            f"{test.only_first} against {test.only_second}",
            f"p = {test.p_value:.3f}",
            "",
        )
    return table
