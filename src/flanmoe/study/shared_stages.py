"""Stages that arms of a study have in common: the first arm that comes to them runs them, the others take over.

A stage is the same where its own settings, those of all stages before it, the model and the seed are: its
fingerprint covers them. What it wrote is copied, but for the model, of which there is one.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flanmoe.core.cache import fingerprint
from flanmoe.core.console import say
from flanmoe.core.files import read_json_file
from flanmoe.core.rundir import RunDir
from flanmoe.stages.recipe import Recipe
from flanmoe.study.executor import RESULT_FILE, Job
from flanmoe.study.study import Study
from flanmoe.training.checkpoints import CHECKPOINTS_FOLDER

MODEL_FOLDER = "model"


def fingerprints(recipe: Recipe) -> list[str]:
    """Return the fingerprint of every stage of a recipe, in order."""
    finished = fingerprint({"model": recipe.model, "seed": recipe.seed})
    found: list[str] = []
    for stage in recipe.stages:
        finished = fingerprint([finished, stage.to_mapping()])
        found.append(finished)
    return found


def take_over(job: Job, finished: str, run: RunDir) -> str | None:
    """Copy what another arm's stage of this fingerprint wrote; return the arm's name, None without one.

    Args:
        job: the arm in hand.
        finished: fingerprint of its stage.
        run: the stage's own folder.
    """
    for folder, result in _stages(job):
        if result["fingerprint"] == finished and not folder.is_relative_to(job.folder):
            left = shutil.ignore_patterns(MODEL_FOLDER, CHECKPOINTS_FOLDER, RESULT_FILE)
            shutil.copytree(folder, run.path, ignore=left, dirs_exist_ok=True)
            # Last: with it the stage counts as finished.
            run.write_json(RESULT_FILE, result)
            return folder.parent.parent.name
    return None


def forget_intermediate_models(study: Study, job: Job) -> None:
    """Remove the models that no arm of this seed ends with or has yet to go on from."""
    needed = _needed_models(study, job)
    for folder, result in list(_stages(job)):
        model = folder / MODEL_FOLDER
        if result["changed_model"] and model.exists() and model not in needed:
            shutil.rmtree(model, ignore_errors=True)
            say(f"  removed the intermediate model of `{result['label']}`")


def _needed_models(study: Study, job: Job) -> set[Path]:
    needed: set[Path] = set()
    for arm in study.arms:
        other = Job(job.study_dir, arm, job.seed, job.data_dir)
        if RunDir(other.folder).has(RESULT_FILE):
            results = RunDir(other.folder).read_json(RESULT_FILE)["stages"]
            needed |= {Path(one["model"]) for one in results[-1:]}
        else:
            chain = set(fingerprints(study.recipe(arm, job.seed)))
            needed |= {
                Path(result["model"])
                for _, result in _stages(job)
                if result["fingerprint"] in chain
            }
    return needed


def _stages(job: Job) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield folder and result of every finished stage of every arm with the job's seed."""
    pattern = f"arms/*/seed-{job.seed}/*/{RESULT_FILE}"
    for path in sorted(job.study_dir.glob(pattern)):
        result: Any = read_json_file(path)
        yield path.parent, result
