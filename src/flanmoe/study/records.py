"""What the stages of one arm and seed left on disk, read back, and which arms have yet to finish."""

from functools import cached_property
from pathlib import Path
from typing import Any

from flanmoe.core.errors import RunError
from flanmoe.core.files import read_json_file
from flanmoe.core.rundir import RunDir
from flanmoe.evaluation.results import SuiteResult, read_result
from flanmoe.models.flops import FlopCount
from flanmoe.models.plan import ParameterCount
from flanmoe.stages.pretrain import PretrainStageResult
from flanmoe.stages.tune import TuneStageResult
from flanmoe.stages.upcycle import UpcycleResult
from flanmoe.study.arm_report import Flops, Parameters
from flanmoe.study.nodes import (
    FAILURE_FILE,
    GRAPH_FILE,
    RESULT_FILE,
    STAGES_FOLDER,
    Branch,
    StageGraph,
    is_finished,
)
from flanmoe.study.report_data import Hardware
from flanmoe.study.study import Study


class SeedResults:
    """What one arm recorded with one seed: its stages by kind, in order."""

    def __init__(self, study_dir: Path, arm: str, seed: int) -> None:
        self.seed = seed
        self._study_dir = study_dir
        result = RunDir(Branch(arm, seed, ()).folder(study_dir)).read_json(RESULT_FILE)
        self.nodes: list[str] = result["nodes"]
        self.final_model: str = result["final_model"]
        self.stages: list[dict[str, Any]] = result["stages"]
        self.machines = [Hardware.parse(stage["hardware"]) for stage in self.stages]
        self._model: dict[str, Any] = result["model"]

    def _of_kind(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        return [(i, stage) for i, stage in enumerate(self.stages) if stage["stage"] == kind]

    @cached_property
    def upcycled(self) -> UpcycleResult | None:
        """The last upcycling, None where there was none."""
        found = self._of_kind("upcycle") or self._of_kind("upcycle_t5")
        return UpcycleResult.parse(found[-1][1]["details"]) if found else None

    @cached_property
    def pretrainings(self) -> dict[str, PretrainStageResult]:
        """Every pre-training by its label, in order."""
        return {
            stage["label"]: PretrainStageResult.parse(stage["details"])
            for _, stage in self._of_kind("pretrain")
        }

    @cached_property
    def tunings(self) -> dict[str, TuneStageResult]:
        """Every tuning by its label, in order."""
        return {
            stage["label"]: TuneStageResult.parse(stage["details"])
            for _, stage in self._of_kind("tune")
        }

    @property
    def tuned(self) -> TuneStageResult | None:
        """The last tuning, None where there was none."""
        return next(reversed(self.tunings.values()), None)

    @property
    def tuning_peak_bytes(self) -> int | None:
        """Measured peak memory of the last tuning, None where it cannot be told from what came before."""
        _, stage = self._of_kind("tune")[-1]
        return stage["peak_memory_bytes"] if stage["peak_memory_is_of_this_stage"] else None

    @property
    def parameters(self) -> Parameters:
        """Counts of the model that the arm ends with; trainable is what its last tuning trained."""
        counts = ParameterCount.parse(self._model["parameters"])
        trainable = self.tuned.parameters.trainable if self.tuned else 0
        return Parameters(total=counts.total, active=counts.active, trainable=trainable)

    @property
    def flops(self) -> Flops:
        """Operations of one token in the model that the arm ends with."""
        count = FlopCount.parse(self._model["flops"])
        return Flops(
            body=count.body,
            head=count.head,
            attention_scores=count.attention_scores,
            context_length=count.context_length,
        )

    @property
    def rejected(self) -> dict[str, int]:
        """Records that were left out of each task because they cannot be read."""
        return {
            task: number
            for _, stage in (*self._of_kind("tune"), *self._of_kind("evaluate"))
            for task, number in stage["details"]["rejected"].items()
        }

    @property
    def evaluation_only(self) -> set[str]:
        """Evaluated tasks whose authors ask that nothing is trained on them."""
        found = self._of_kind("evaluate")
        return {name for _, stage in found for name in stage["details"]["evaluation_only"]}

    @cached_property
    def before(self) -> SuiteResult | None:
        """The first evaluation before any tuning, with its examples; None where there was none."""
        found = [place for place in self._evaluations if place < self._first_tuning]
        return self._evaluation(found[0]) if found else None

    @cached_property
    def after(self) -> SuiteResult | None:
        """The last evaluation after tuning, with its examples; None where there was none."""
        found = [place for place in self._evaluations if place > self._first_tuning]
        return self._evaluation(found[-1]) if found else None

    @property
    def last(self) -> SuiteResult | None:
        """The evaluation after tuning, or the one before it where there is no other."""
        return self.after or self.before

    @property
    def _evaluations(self) -> list[int]:
        return [place for place, _ in self._of_kind("evaluate")]

    @property
    def _first_tuning(self) -> int:
        return next((place for place, _ in self._of_kind("tune")), len(self.stages))

    def _evaluation(self, place: int) -> SuiteResult:
        return read_result(self._study_dir / STAGES_FOLDER / self.nodes[place])


def finished_results(study: Study, run: RunDir) -> dict[str, list[SeedResults]]:
    """Read the results of every arm and seed that has finished; arms without any are left out.

    Raises:
        RunError: if none has.
    """
    graph = _graph(run)
    found: dict[str, list[SeedResults]] = {}
    for arm in study.arms:
        branches = [branch for branch in graph.branches if branch.arm == arm]
        done = [branch.seed for branch in branches if _has_finished(run, graph, branch)]
        if done:
            found[arm] = [SeedResults(run.path, arm, seed) for seed in done]
    if not found:
        raise RunError(
            f"A report needs an arm that has finished, but in {run.path} none has. Finish the run first "
            "(`--resume`)."
        )
    return found


def unfinished(run: RunDir) -> list[str]:
    """Say of every arm and seed that has not finished where it stands, and why if something failed."""
    graph = _graph(run)
    return [
        _standing(run, graph, branch)
        for branch in graph.branches
        if not _has_finished(run, graph, branch)
    ]


def _graph(run: RunDir) -> StageGraph:
    if not run.has(GRAPH_FILE):
        raise RunError(
            f"The run folder {run.path} has no {GRAPH_FILE}. Finish the run first (`--resume`)."
        )
    return StageGraph.read(run.path)


def _has_finished(run: RunDir, graph: StageGraph, branch: Branch) -> bool:
    path = branch.folder(run.path) / RESULT_FILE
    names = [graph.nodes[key].folder_name for key in branch.stages]
    # A result of before the study changed has other stages.
    return path.exists() and read_json_file(path)["nodes"] == names


def _standing(run: RunDir, graph: StageGraph, branch: Branch) -> str:
    open_keys = [
        key
        for key in branch.stages
        if not is_finished(graph.folder(run.path, key), model_needed=False)
    ]
    failed = [key for key in open_keys if (graph.folder(run.path, key) / FAILURE_FILE).exists()]
    said = f"{branch.name} is not finished and not in this report"
    if failed:
        failure: Any = read_json_file(graph.folder(run.path, failed[0]) / FAILURE_FILE)
        return f"{said}: its stage `{graph.nodes[failed[0]].label}` failed: {failure['message']}"
    done = len(branch.stages) - len(open_keys)
    return f"{said}: {done} of its {len(branch.stages)} stages are done."
