"""The parts of the main job that run in child processes: prepare a study's folder, report what came out.

`launch` is the process that sends for them.
"""

from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import yaml

from flanmoe.core.config import read_yaml
from flanmoe.core.console import say, show_table, warn
from flanmoe.core.errors import UserError
from flanmoe.core.rundir import RunDir
from flanmoe.data.tasks import TaskConfig, expand
from flanmoe.study.collect import collect
from flanmoe.study.executor import COSTS_FILE
from flanmoe.study.plan import plan_study, plan_table
from flanmoe.study.records import SeedResults
from flanmoe.study.report import summary_table, write_report
from flanmoe.study.report_data import ArmReport, Evaluation, ReportData, Score
from flanmoe.study.runner import open_study
from flanmoe.study.study import Study, load_study, study_from_mapping

_DEFAULT_MINUTES = 15.0


def quickstart_study(*, minutes: float, overrides: Sequence[str]) -> Study:
    """Return the quickstart's study with tuning and evaluation scaled to a budget.

    Tokens are a function of `minutes` alone and not of the machine's speed, so that a run can be repeated.
    """
    resource = package_files("flanmoe.study").joinpath("quickstart.yaml")
    values = yaml.safe_load(resource.read_text(encoding="utf-8"))
    share = minutes / _DEFAULT_MINUTES
    steps = max(1, round(values["defaults"]["tune"]["train"]["steps"] * share))
    limit = values["defaults"]["evaluate"]["limit"]
    # A limited suite needs one example of each task.
    fewest = len(
        expand([TaskConfig.parse(task) for task in values["defaults"]["evaluate"]["tasks"]])
    )
    scaled = [
        f"defaults.tune.train.steps={steps}",
        # The first of n warm-up steps has rate 0: with no step beside them nothing would train.
        f"defaults.tune.train.warmup_steps={min(2, steps - 1)}",
        f"defaults.evaluate.limit={max(fewest, min(limit, round(limit * share)))}",
    ]
    changes = [] if share == 1 else scaled
    return study_from_mapping(values, overrides=[*changes, *overrides], origin="quickstart.yaml")


def prepare(
    *,
    file: str,
    overrides: Sequence[str],
    profile: str | None,
    folder: str | None,
    data_dir: str | None,
    resume: bool,
) -> dict[str, Any]:
    """Read a recipe or a study, plan it and make its folder; see `launch.run_file` for the arguments.

    Returns:
        `folder`, and in `jobs` arm and seed of every job.

    Raises:
        UserError: if an arm does not fit this machine, or something asked for cannot be done.
    """
    study = load_study(Path(file), overrides=overrides, profile=profile)
    return _prepare(study, folder, data_dir=data_dir, resume=resume)


def prepare_quickstart(
    *,
    minutes: float,
    overrides: Sequence[str],
    folder: str | None,
    data_dir: str | None,
    resume: bool,
) -> dict[str, Any]:
    """Plan the quickstart's study and make its folder; see `prepare`."""
    study = quickstart_study(minutes=minutes, overrides=overrides)
    return _prepare(study, folder, data_dir=data_dir, resume=resume)


def _prepare(
    study: Study, folder: str | None, *, data_dir: str | None, resume: bool
) -> dict[str, Any]:
    path = Path(folder) if folder else Path("runs") / study.name
    if not resume:
        _check_plan(study, Path(data_dir) if data_dir else None, path)
    run = open_study(study, path, resume=resume)
    return {"folder": str(run.path), "jobs": [[arm, seed] for arm, seed in study.jobs]}


def report(*, folder: str) -> dict[str, Any]:
    """Write the report of a finished run; returns what `--json` prints."""
    return rebuild_report(Path(folder))


def rebuild_report(folder: Path) -> dict[str, Any]:
    """Write the report of a finished run again.

    Raises:
        RunError: if `folder` is not a run's, or an arm is not finished.
    """
    run = RunDir.existing(folder)
    return _report(Study.parse(read_yaml(run.file("recipe.yaml")), origin="recipe.yaml"), run)


def _check_plan(study: Study, data_dir: Path | None, folder: Path) -> None:
    planned = plan_study(study, data_dir, folder=folder)
    show_table(plan_table(planned))
    if planned.refusals:
        raise UserError("This will not fit: " + " ".join(planned.refusals))


def _report(study: Study, run: RunDir) -> dict[str, Any]:
    data = collect(study, run)
    paths = write_report(data, run.path)
    show_table(summary_table(data))
    for sentence in data.warnings:
        warn(sentence)
    say(f"Report: {paths.html}")
    return _summary(study, run, data) | {"report": str(paths.html)}


def _summary(study: Study, run: RunDir, data: ReportData) -> dict[str, Any]:
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
        "peak_memory_bytes": _peak_memory(study, run),
        "expert_load": [list(row) for row in loads[0].shares] if loads else None,
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
        **_score_summary("loss", evaluation.loss),
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


def _peak_memory(study: Study, run: RunDir) -> int:
    """The most that the parent and one of its children can have held at a time."""
    rows = run.rows(COSTS_FILE)
    stages = [
        stage["peak_memory_bytes"]
        for arm in study.arms
        for seed in study.seeds
        for stage in SeedResults(run.path, arm, seed).stages
    ]
    children = [row.get("peak_memory_of_children_bytes", 0) for row in rows]
    parents = [row.get("peak_memory_bytes", 0) for row in rows]
    return max([*stages, *children]) + max(parents, default=0)
