"""What came out of a run: its report, and the summary that `--json` prints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flanmoe.core.config import read_yaml
from flanmoe.core.console import say, show_table, warn
from flanmoe.core.rundir import RunDir
from flanmoe.study.arm_report import ArmReport, Evaluation, Score
from flanmoe.study.collect import collect
from flanmoe.study.executor import COSTS_FILE
from flanmoe.study.records import SeedResults, finished_results, unfinished
from flanmoe.study.report import claims_terminal_table, summary_table, write_report
from flanmoe.study.report_data import ReportData
from flanmoe.study.study import Study

_MOST_ARMS_SHOWN = 8


def rebuild_report(folder: Path | str) -> dict[str, Any]:
    """Write the report of a run, for the first time or again; returns what `--json` prints.

    It covers the arms and seeds that have finished, and lists the others.

    Raises:
        RunError: if `folder` is not a run's, or no arm is finished.
    """
    run = RunDir.existing(Path(folder))
    study = Study.parse(read_yaml(run.file("recipe.yaml")), origin="recipe.yaml")
    data = collect(study, run)
    paths = write_report(data, run.path)
    claims = claims_terminal_table(data)
    if claims is not None:
        show_table(claims)
    # Of many arms a terminal shows only slivers of columns; the report has room for them.
    if len(data.arms) <= _MOST_ARMS_SHOWN:
        show_table(summary_table(data))
    for sentence in data.warnings:
        warn(sentence)
    results = finished_results(study, run)
    models = {arm: seeds[0].final_model for arm, seeds in results.items()}
    if len(models) <= _MOST_ARMS_SHOWN:
        for arm, model in models.items():
            say(f"Model of {arm}: {model}")
    say(f"Report: {paths.html}")
    return _summary(study, run, data, results) | {
        "models": models,
        "unfinished": unfinished(run),
        "report": str(paths.html),
    }


def _summary(
    study: Study, run: RunDir, data: ReportData, results: Mapping[str, Sequence[SeedResults]]
) -> dict[str, Any]:
    differences = [
        arm.step0_max_abs_diff for arm in data.arms if arm.step0_max_abs_diff is not None
    ]
    loads = [arm.expert_load for arm in data.arms if arm.expert_load is not None]
    return {
        "study": study.name,
        "folder": str(run.path),
        "step0_max_abs_diff": max(differences) if differences else None,
        "arms": {arm.label: _arm_summary(arm) for arm in data.arms},
        "parameters": {arm.label: arm.parameters.to_mapping() for arm in data.arms},
        "tokens": max(arm.ledger.real_tokens for arm in data.arms),
        "seconds": sum(row["seconds"] for row in run.rows(COSTS_FILE)),
        "peak_memory_bytes": _peak_memory(run, results),
        "expert_load": [list(row) for row in loads[0].shares] if loads else None,
        "claims": [item.to_mapping() for item in data.claims],
        "comparisons": [item.to_mapping() | {"verdict": item.verdict} for item in data.comparisons],
    }


def _arm_summary(arm: ArmReport) -> dict[str, Any]:
    return {
        "before": _evaluation_summary(arm.before),
        "after": _evaluation_summary(arm.after),
        "tokens": arm.ledger.real_tokens,
        "training_seconds": arm.ledger.seconds,
        "training_flops": arm.ledger.flops,
        "flops_per_token": arm.flops.total,
        "peak_memory_bytes": arm.ledger.peak_memory_bytes,
    }


def _evaluation_summary(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {
        **(_score_summary("loss", evaluation.loss) if evaluation.loss else {}),
        **(_score_summary("accuracy", evaluation.accuracy) if evaluation.accuracy else {}),
        "tasks": len(evaluation.tasks),
    }


def _score_summary(name: str, score: Score) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: score.mean,
        f"{name}_standard_error": score.standard_error,
        f"{name}_examples": score.num_examples,
    }
    return found if score.chance is None else {**found, f"{name}_chance": score.chance}


def _peak_memory(run: RunDir, results: Mapping[str, Sequence[SeedResults]]) -> int:
    """The most that the command and the children that it had at a time can have held."""
    rows = run.rows(COSTS_FILE)
    stages = {
        name: stage["peak_memory_bytes"]
        for seeds in results.values()
        for seed in seeds
        for name, stage in zip(seed.nodes, seed.stages, strict=True)
    }
    workers = max((row["workers"] for row in rows), default=1)
    largest = sorted([*stages.values()], reverse=True)[:workers]
    children = [row["peak_memory_of_children_bytes"] for row in rows]
    parents = [row["peak_memory_bytes"] for row in rows]
    return max(sum(largest), *children) + max(parents, default=0)
