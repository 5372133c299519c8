"""The stage `evaluate`: scores of the model in hand on tasks that it is not trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flanmoe.core.config import Config
from flanmoe.core.console import show_table
from flanmoe.core.errors import ConfigError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.comparison import SuiteComparison, compare_files
from flanmoe.evaluation.metrics import Estimate
from flanmoe.evaluation.results import SuiteResult, write_result
from flanmoe.evaluation.suites import SuiteConfig, evaluate_suite, load_suite, named_suite
from flanmoe.stages.context import StageContext
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import EvaluateStage


class EvaluateResult(Config):
    """What an evaluation found; every example's outcome lies beside it.

    Attributes:
        scores: the scores.
        evaluation_only: tasks whose authors ask that nothing is trained on them.
    """

    scores: SuiteResult
    evaluation_only: tuple[str, ...]


def run_evaluate(stage: EvaluateStage, held: HeldModel, context: StageContext) -> EvaluateResult:
    """Score the model in hand; every example's outcome goes into the stage's folder."""
    config = SuiteConfig(**{name: getattr(stage, name) for name in SuiteConfig.model_fields})
    # The same branch for every label, so that "before" and "after" draw the same questions.
    seeds = context.seeds.child("evaluate")
    result = _score(held, config, data_dir=context.data_dir, seeds=seeds)
    write_result(result, context.run.path)
    tasks, _ = load_suite(config, data_dir=context.data_dir)
    kept_back = {task.name for task in tasks if task.evaluation_only}
    names = tuple(score.task for score in result.tasks if score.task in kept_back)
    return EvaluateResult(scores=result.summary(), evaluation_only=names)


def _score(
    held: HeldModel, config: SuiteConfig, *, data_dir: Path | None, seeds: SeedTree
) -> SuiteResult:
    return evaluate_suite(
        held.model(),
        held.tokenizer(),
        config,
        data_dir=data_dir,
        seeds=seeds,
        training_hashes=held.training_hashes(),
    )


def evaluate_reference(
    reference: str,
    names: Sequence[str],
    *,
    suite: str | None,
    split: str,
    limit: int | None,
    data_dir: Path | None,
    out: Path | None,
) -> dict[str, Any]:
    """Score a model on tasks or a named suite; what `flanmoe eval` does.

    Raises:
        ConfigError: if no task is named, or the suite is not known.
        RunError: if `out` already holds files.
    """
    if out is not None and out.exists() and any(out.iterdir()):
        raise RunError(f"The folder {out} must be empty or new, but already holds files.")
    values: dict[str, Any] = {"tasks": _task_configs(names, suite, split)}
    config = SuiteConfig.parse(
        values | ({"limit": limit} if limit else {}), origin="The command line"
    )
    result = _score(
        HeldModel(reference), config, data_dir=data_dir, seeds=SeedTree(0).child("evaluate")
    )
    if out is not None:
        write_result(result, out)
    show_table(_score_table(reference, result))
    return {"model": reference, **result.to_mapping()}


def _task_configs(names: Sequence[str], suite: str | None, split: str) -> list[dict[str, Any]]:
    exemplars = [task.to_mapping() for task in named_suite(suite)] if suite else []
    named = [
        {"name": name} if name.startswith("exemplars/") else {"name": name, "split": split}
        for name in names
    ]
    if not exemplars and not named:
        raise ConfigError(
            "An evaluation needs `--suite NAME` or at least one `--task NAME`, but has none."
        )
    return [*exemplars, *named]


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
    """Write a mean with its standard error (the clustered one where there is one)."""
    if estimate is None:
        return ""
    error = estimate.clustered_standard_error or estimate.standard_error
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
