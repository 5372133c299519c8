"""Running a study from Python, and one stage of it in this process.

What a stage is stands in its folder (`node.json`); its `result.json` is written last, so that a stage with a
result is finished and is not run again.
"""

import time
from pathlib import Path
from typing import Any

from flanmoe.core.config import Config
from flanmoe.core.console import say
from flanmoe.core.files import read_json_file
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
)
from flanmoe.stages.tune import run_tune
from flanmoe.stages.upcycle import run_upcycle
from flanmoe.study.executor import Executor, require_one_process
from flanmoe.study.folder import open_study
from flanmoe.study.graph import build_graph
from flanmoe.study.machine import hardware
from flanmoe.study.nodes import MODEL_FOLDER, NODE_FILE, RESULT_FILE
from flanmoe.study.plan import plan_graph
from flanmoe.study.schedule import run_graph
from flanmoe.study.study import Study
from flanmoe.training.checkpoints import remove_checkpoints


def run_study(
    study: Study, folder: Path, *, executor: Executor, data_dir: Path | None, resume: bool
) -> RunDir:
    """Run every stage of every arm with every seed that is not finished yet; returns the study's folder.

    Raises:
        ConfigError: if torchrun started several processes.
        RunError: if the folder holds something else, or `resume` finds nothing to resume.
        FlanmoeError: what a stage raised; finished stages are kept, and arms that do not need it are run.
    """
    require_one_process()
    graph = build_graph(study, data_dir)
    if executor.workers > 1:
        # Which run together depends on the memory that they are planned to take.
        _, graph = plan_graph(study, graph, data_dir, folder=folder, workers=executor.workers)
    run = open_study(folder, study, graph, resume=resume)
    run_graph(run, executor, data_dir=data_dir).raise_if_stopped()
    return run


class _OneStage(Config):
    """The settings of a stage as they lie in its folder."""

    settings: Stage


def run_stage(folder: Path, held: HeldModel | None, data_dir: Path | None) -> HeldModel:
    """Run the stage in a folder below `stages/` in this process, which holds its lock.

    Args:
        folder: of the stage.
        held: what the stage before it in this process returned, None for none. It is used where it is the model
            that the stage takes.
        data_dir: data folder, None where none was named.

    Returns:
        The model that the stage left or scored.
    """
    node: dict[str, Any] = read_json_file(folder / NODE_FILE)
    stage = _OneStage.parse({"settings": node["settings"]}, origin=str(folder)).settings
    run = RunDir(folder)
    run.file(RESULT_FILE).unlink(missing_ok=True)
    held = _taken(node, folder.parent, held)
    # All arms of a seed share the tree of draws, so that dense and sparse see the same batches; a score's seed
    # is that of the questions, the same for all seeds: their mean is over the luck of training.
    seeds = SeedTree(node["seed"])
    say(f"  {stage.label}")
    peak_is_own = reset_peak_memory()
    start = time.monotonic()
    successor, details = _run_stage(stage, held, StageContext(run, seeds, seeds, data_dir))
    result = {
        "stage": stage.stage,
        "label": stage.label,
        "key": node["key"],
        "model": successor.reference,
        "changed_model": successor is not held,
        "seconds": time.monotonic() - start,
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_memory_is_of_this_stage": peak_is_own,
        "hardware": hardware().to_mapping(),
        "size": _size(successor, (node["lengths"][0], node["lengths"][1])),
        "details": details.to_mapping(),
    }
    run.write_json(RESULT_FILE, result)
    # Only now: a run that is killed before goes on from them.
    remove_checkpoints(run.path)
    return successor


def _taken(node: dict[str, Any], stages: Path, held: HeldModel | None) -> HeldModel:
    """Return the model that a stage takes: the one in hand if it is that, else what lies on disk."""
    parent = node["parent_folder"]
    reference = node["model"] if parent is None else str(stages / parent / MODEL_FOLDER)
    if reference is None:
        return HeldModel(None)
    return held if held is not None and held.reference == reference else HeldModel(reference)


def _size(held: HeldModel, lengths: tuple[int, int | None]) -> dict[str, Any]:
    """Parameters and FLOPs of the model that a stage leaves or scores, from its configuration."""
    model = meta_model(load_config(held.reference))
    return {
        "parameters": count_parameters(model).to_mapping(),
        "flops": count_row_flops(model, length=lengths[0], target_length=lengths[1]).to_mapping(),
    }


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
