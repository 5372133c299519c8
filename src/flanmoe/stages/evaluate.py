"""The stage `evaluate`: scores of the model in hand on tasks that it is not trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flanmoe.core.config import Config
from flanmoe.core.console import say, show_table
from flanmoe.core.errors import ConfigError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.tasks import num_rejected
from flanmoe.evaluation.comparison import compare_files
from flanmoe.evaluation.lm.journal import JOURNAL_FILE
from flanmoe.evaluation.results import SuiteResult, write_result
from flanmoe.evaluation.routing import (
    FIGURE_FILE,
    RoutingListener,
    routing_report,
    write_routing,
)
from flanmoe.evaluation.suites import (
    SuiteConfig,
    evaluate_loaded,
    load_evaluation,
    named_suite,
    warn_of_left_out,
    warn_of_skipped,
)
from flanmoe.evaluation.suites.named import check_suite_name, prompted_suite
from flanmoe.evaluation.suites.plan import EvaluationPlan
from flanmoe.evaluation.suites.run import Announce
from flanmoe.stages.context import StageContext
from flanmoe.stages.evaluation_tables import (
    average_table,
    comparison_table,
    notes_of,
    plan_table,
    score_table,
)
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import EvaluateStage
from flanmoe.stages.task_names import named_tasks

_DEFAULT_SPLIT = "test"
# Questions of each group of a few-shot suite on a CPU, where all of them would take a day.
LIMIT_ON_CPU = 100


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
    loaded = load_evaluation(config, data_dir=context.data_dir)
    result = evaluate_loaded(
        held.model(),
        held.tokenizer(),
        loaded,
        config=config,
        # The same branch for every label, so that "before" and "after" draw the same questions.
        seeds=context.questions.child("evaluate"),
        training_hashes=held.training_hashes(),
    )
    write_result(result, context.run.path)
    tasks = loaded.data_sets
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
    resume: bool = False,
    routing: bool = False,
) -> dict[str, Any]:
    """Score a model on tasks or a named suite; what `flanmoe eval` does.

    The plan is printed before anything goes through the model.

    Args:
        reference: a known name, a folder or a hub id.
        names: tasks by name.
        suite: a suite by name, None for none.
        split: split of the tasks in `names`; None takes `test` where they have splits.
        settings: the other fields of `SuiteConfig`; None stands for the default, which is 100 for the `limit`
            of a few-shot suite on a CPU and as many as fit for `batch_size`; `limit` 0 is every question.
        data_dir: data folder, None where none was named.
        out: folder for the result, None for none.
        resume: go on with what an evaluation that was stopped left in `out`.
        routing: record which experts each task uses.

    Raises:
        ModelError: if `routing` is asked of a model that is no sparse decoder.
        ConfigError: if no task is named, the suite is not known, or an option has no effect.
        RunError: if `out` already holds files and is not to be gone on with, or holds another evaluation.
    """
    _check_folder(out, resume=resume, routing=routing)
    given = _settings_of(names, suite, split, settings)
    config = SuiteConfig.parse(given, origin="The command line")
    loaded = load_evaluation(config, data_dir=data_dir)
    warn_of_skipped(loaded.skipped)
    warn_of_left_out(loaded.left_out)
    held = HeldModel(reference)
    listener = RoutingListener(held.model()) if routing else None
    on_cpu = held.model().device.type == "cpu"
    if settings.get("limit") is None and loaded.prompted is not None and on_cpu:
        config = config.model_copy(update={"limit": LIMIT_ON_CPU})
    plans: list[EvaluationPlan] = []
    result = evaluate_loaded(
        held.model(),
        held.tokenizer(),
        loaded,
        config=config,
        seeds=SeedTree(0).child("evaluate"),
        training_hashes=held.training_hashes(),
        announce=_announcing(plans, on_cpu=on_cpu),
        journal=None if out is None else out / JOURNAL_FILE,
        listener=listener,
    )
    _show(reference, result)
    _write(result, listener, out)
    return {"model": reference, **result.to_mapping(), "plan": plans[0].to_mapping()}


def compare_folders(first: Path, second: Path) -> dict[str, Any]:
    """Compare two written results example by example; what `flanmoe eval --compare` does."""
    comparison = compare_files(first, second)
    show_table(comparison_table(first, second, comparison))
    return comparison.to_mapping()


def _announcing(plans: list[EvaluationPlan], *, on_cpu: bool) -> Announce:
    def announce(plan: EvaluationPlan) -> None:
        plans.append(plan)
        show_table(plan_table(plan, on_cpu=on_cpu))

    return announce


def _show(reference: str, result: SuiteResult) -> None:
    show_table(score_table(reference, result))
    if result.groups:
        show_table(average_table(result))
    for note in notes_of(result):
        say(note)


def _write(result: SuiteResult, listener: RoutingListener | None, out: Path | None) -> None:
    if out is None:
        return
    if listener is not None:
        clusters = {score.task: score.cluster for score in result.tasks}
        path = write_routing(routing_report(listener.counts(), clusters), out)
        say(
            f"Which experts each task uses is in {path}, and drawn in {path.with_name(FIGURE_FILE)}."
        )
    write_result(result, out)


def _check_folder(out: Path | None, *, resume: bool, routing: bool) -> None:
    if routing and out is None:
        raise ConfigError(
            "`--routing` writes files beside the scores, but `--out` names no folder for them. Name one."
        )
    if routing and resume:
        raise ConfigError(
            "`--routing` must see every request, but with `--resume` those that are finished do not run again. "
            "Leave one of them out."
        )
    if resume and out is None:
        raise ConfigError(
            "`--resume` goes on with what an evaluation left in a folder, but `--out` names none. Name it."
        )
    if out is None or not out.exists() or not any(out.iterdir()):
        return
    if not resume:
        way_out = "Name another one with `--out`"
        if (out / JOURNAL_FILE).exists():
            way_out += ", or go on with the evaluation that is in it with `--resume`"
        raise RunError(
            f"The folder {out} must be empty or new, but already holds files. {way_out}."
        )
    if not (out / JOURNAL_FILE).exists():
        raise RunError(
            f"The folder {out} must hold an evaluation to go on with, but has no {JOURNAL_FILE}. Name another "
            "one with `--out`."
        )


def _settings_of(
    names: Sequence[str], suite: str | None, split: str | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the command line says as the fields of a `SuiteConfig`."""
    if not suite and not names:
        raise ConfigError(
            "An evaluation needs `--suite NAME` or at least one `--task NAME`, but has none."
        )
    if suite is not None:
        check_suite_name(suite)
    if split is not None and not names:
        raise ConfigError(
            f"`--split` must go with `--task NAME`, but the suite `{suite}` brings its own splits. "
            "Leave `--split` out."
        )
    given = {name: value for name, value in settings.items() if value is not None}
    given["batch_size"] = settings.get("batch_size")
    if not given.get("limit"):
        given.pop("limit", None)
    if suite is not None and not names:
        return {**given, "suite": suite}
    if suite is not None and prompted_suite(suite) is not None:
        raise ConfigError(
            f"The suite `{suite}` must be evaluated by itself, but `--task {names[0]}` stands beside it. "
            "Evaluate the task in a run of its own."
        )
    tasks = [
        *(named_suite(suite) if suite else ()),
        *named_tasks(names, split=split, default_split=_DEFAULT_SPLIT),
    ]
    return {**given, "tasks": [task.to_mapping() for task in tasks]}
