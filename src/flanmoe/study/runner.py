"""Running a study: every arm with every seed, stage after stage, resumable at every one.

A stage that finished has a `result.json` whose fingerprint covers its own configuration and that of all
stages before it. On `--resume` such stages are not run again, and what arms have in common runs once
(`shared_stages`).
"""

import time
from pathlib import Path
from typing import Any

from flanmoe.core.config import Config, read_yaml
from flanmoe.core.console import say
from flanmoe.core.memory import peak_memory_bytes, reset_peak_memory
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.models.loading import load_config
from flanmoe.models.meta import meta_model
from flanmoe.models.plan import count_parameters
from flanmoe.models.row_flops import count_row_flops
from flanmoe.stages.context import StageContext
from flanmoe.stages.evaluate import run_evaluate
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.pretrain import run_pretrain
from flanmoe.stages.recipe import (
    EvaluateStage,
    PretrainStage,
    Stage,
    TuneStage,
    UpcycleStage,
    UpcycleT5Stage,
    stated_lengths,
)
from flanmoe.stages.tune import run_tune
from flanmoe.stages.upcycle import run_upcycle
from flanmoe.study.executor import RESULT_FILE, Executor, Job, require_one_process, run_jobs
from flanmoe.study.machine import hardware
from flanmoe.study.shared_stages import fingerprints, forget_intermediate_models, take_over
from flanmoe.study.study import Study
from flanmoe.training.checkpoints import remove_checkpoints


def run_study(
    study: Study, folder: Path, *, executor: Executor, data_dir: Path | None, resume: bool
) -> RunDir:
    """Run every arm with every seed that is not finished yet; returns the study's folder.

    Raises:
        ConfigError: if torchrun started several processes.
        RunError: if the folder holds something else, or `resume` finds nothing to resume.
        FlanmoeError: what a job raised; finished jobs are kept.
    """
    require_one_process()
    run = RunDir.open(folder, study, resume=resume)
    run_jobs(run, [Job(folder, arm, seed, data_dir) for arm, seed in study.jobs], executor)
    return run


def run_job(*, study_dir: str, arm: str, seed: int, data_dir: str | None) -> None:
    """Run one job in this process, which `LocalExecutor` started for it."""
    run_arm(Job(Path(study_dir), arm, seed, Path(data_dir) if data_dir else None))


def run_arm(job: Job) -> None:
    """Run one arm with one seed in this process."""
    study = Study.parse(read_yaml(job.study_dir / "recipe.yaml"), origin="recipe.yaml")
    recipe = study.recipe(job.arm, job.seed)
    folder = RunDir(job.folder)
    start = time.monotonic()
    # Shared by all arms of this seed, so that dense and sparse see the same batches.
    seeds = SeedTree(job.seed)
    # Shared by all seeds too: their mean is over the luck of training, on the same questions.
    questions = SeedTree(study.seeds[0])
    held = HeldModel(recipe.model)
    results: list[dict[str, Any]] = []
    for number, (stage, finished) in enumerate(
        zip(recipe.stages, fingerprints(recipe), strict=True)
    ):
        run = folder.child(f"{number:02d}-{stage.label}")
        context = StageContext(run, seeds, questions, job.data_dir)
        if run.has(RESULT_FILE):
            say(f"  {stage.label}: finished before")
        elif arm := take_over(job, finished, run):
            say(f"  {stage.label}: taken over from arm {arm}")
        held, result = _run_or_skip(stage, held, context, finished)
        results.append(result)
    result = {
        "seconds": time.monotonic() - start,
        "hardware": hardware().to_mapping(),
        "model": _size(held, stated_lengths(recipe.stages)),
        "stages": results,
    }
    folder.write_json(RESULT_FILE, result)
    forget_intermediate_models(study, job)


def _size(held: HeldModel, lengths: tuple[int, int | None]) -> dict[str, Any]:
    """Parameters and FLOPs of the model that an arm ends with, from its configuration."""
    model = meta_model(load_config(held.reference))
    return {
        "parameters": count_parameters(model).to_mapping(),
        "flops": count_row_flops(model, length=lengths[0], target_length=lengths[1]).to_mapping(),
    }


def _run_or_skip(
    stage: Stage, held: HeldModel, context: StageContext, finished: str
) -> tuple[HeldModel, dict[str, Any]]:
    if context.run.has(RESULT_FILE):
        result = context.run.read_json(RESULT_FILE)
        if result["fingerprint"] == finished:
            remove_checkpoints(context.run.path)
            return (HeldModel(result["model"]) if result["changed_model"] else held), result
    say(f"  {stage.label}")
    peak_is_own = reset_peak_memory()
    start = time.monotonic()
    successor, details = _run_stage(stage, held, context)
    result = {
        "stage": stage.stage,
        "label": stage.label,
        "fingerprint": finished,
        "model": successor.reference,
        "changed_model": successor is not held,
        "seconds": time.monotonic() - start,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_memory_is_of_this_stage": peak_is_own,
        "details": details.to_mapping(),
    }
    context.run.write_json(RESULT_FILE, result)
    # Only now: a run that is killed before goes on from them.
    remove_checkpoints(context.run.path)
    return successor, result


def _run_stage(stage: Stage, held: HeldModel, context: StageContext) -> tuple[HeldModel, Config]:
    match stage:
        case PretrainStage():
            return run_pretrain(stage, held, context)
        case UpcycleStage() | UpcycleT5Stage():
            return run_upcycle(stage, held, context)
        case TuneStage():
            return run_tune(stage, held, context)
        case EvaluateStage():
            return held, run_evaluate(stage, held, context)
