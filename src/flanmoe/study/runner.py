"""Running a study: every arm with every seed, stage after stage, resumable at every one.

A stage that finished has a `result.json` whose fingerprint covers its own configuration and that of all
stages before it. On `--resume` such stages are not run again.
"""

import shutil
import time
from pathlib import Path
from typing import Any

from flanmoe.core.cache import fingerprint
from flanmoe.core.config import Config, read_yaml
from flanmoe.core.console import say
from flanmoe.core.memory import peak_memory_bytes, reset_peak_memory
from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree
from flanmoe.stages.context import StageContext
from flanmoe.stages.evaluate import run_evaluate
from flanmoe.stages.held_model import HeldModel
from flanmoe.stages.recipe import EvaluateStage, Recipe, Stage, TuneStage, UpcycleStage
from flanmoe.stages.tune import run_tune
from flanmoe.stages.upcycle import run_upcycle
from flanmoe.study.executor import Executor, Job
from flanmoe.study.study import Study

RESULT_FILE = "result.json"


def run_study(
    study: Study, folder: Path, *, executor: Executor, data_dir: Path | None, resume: bool
) -> RunDir:
    """Run every arm with every seed that is not finished yet; returns the study's folder.

    Raises:
        RunError: if the folder holds something else, or `resume` finds nothing to resume.
        FlanmoeError: what a job raised; finished jobs are kept.
    """
    run = RunDir.open(folder, study, resume=resume)
    for seed in study.seeds:
        for arm in study.arms:
            job = Job(folder, arm, seed, data_dir)
            if RunDir(job.folder).has(RESULT_FILE):
                say(f"Arm {arm}, seed {seed}: finished before.")
                continue
            say(f"Arm {arm}, seed {seed}")
            executor.run(job)
    return run


def run_arm(job: Job) -> None:
    """Run one arm with one seed in this process."""
    study = Study.parse(read_yaml(job.study_dir / "recipe.yaml"), origin="recipe.yaml")
    recipe = study.recipe(job.arm, job.seed)
    folder = RunDir(job.folder)
    start = time.monotonic()
    # Shared by all arms of this seed, so that dense and sparse see the same batches.
    seeds = SeedTree(job.seed)
    held = HeldModel(recipe.model)
    finished = fingerprint({"model": recipe.model, "seed": job.seed})
    results: list[dict[str, Any]] = []
    for number, stage in enumerate(recipe.stages):
        run = folder.child(f"{number:02d}-{stage.label}")
        finished = fingerprint([finished, stage.to_mapping()])
        held, result = _run_or_skip(stage, held, StageContext(run, seeds, job.data_dir), finished)
        results.append(result)
    _forget_intermediate_models(folder, results)
    folder.write_json(RESULT_FILE, {"seconds": time.monotonic() - start, "stages": results})


def _run_or_skip(
    stage: Stage, held: HeldModel, context: StageContext, finished: str
) -> tuple[HeldModel, dict[str, Any]]:
    if context.run.has(RESULT_FILE):
        result = context.run.read_json(RESULT_FILE)
        if result["fingerprint"] == finished:
            say(f"  {stage.label}: finished before")
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
    return successor, result


def _run_stage(stage: Stage, held: HeldModel, context: StageContext) -> tuple[HeldModel, Config]:
    match stage:
        case UpcycleStage():
            return run_upcycle(stage, held, context)
        case TuneStage():
            return run_tune(stage, held, context)
        case EvaluateStage():
            return held, run_evaluate(stage, held, context)


def _forget_intermediate_models(folder: RunDir, results: list[dict[str, Any]]) -> None:
    """Remove the models that a later stage of the finished arm replaced; the last one stays."""
    changed = [result for result in results if result["changed_model"]]
    for result in changed[:-1]:
        model = Path(result["model"])
        if model.is_relative_to(folder.path):
            shutil.rmtree(model, ignore_errors=True)
            say(f"  removed the intermediate model of `{result['label']}`; the last one is kept")


def final_model(folder: RunDir, recipe: Recipe) -> str:
    """Return the reference of the model that a finished arm ended with."""
    stages = folder.read_json(RESULT_FILE)["stages"]
    return stages[-1]["model"] if stages else recipe.model
