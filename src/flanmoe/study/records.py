"""What the stages of one arm and seed left on disk, read back."""

from functools import cached_property
from pathlib import Path
from typing import Any

from flanmoe.core.rundir import RunDir
from flanmoe.evaluation.results import SuiteResult, read_result
from flanmoe.models.flops import FlopCount
from flanmoe.models.plan import ParameterCount
from flanmoe.stages.pretrain import PretrainStageResult
from flanmoe.stages.tune import TuneStageResult
from flanmoe.stages.upcycle import UpcycleResult
from flanmoe.study.arm_report import Flops, Parameters
from flanmoe.study.executor import RESULT_FILE, Job
from flanmoe.study.report_data import Hardware


class SeedResults:
    """What one arm recorded with one seed: its stages by kind, in order."""

    def __init__(self, study_dir: Path, arm: str, seed: int) -> None:
        self.seed = seed
        self._folder = RunDir(Job(study_dir, arm, seed, None).folder)
        result = self._folder.read_json(RESULT_FILE)
        self.stages: list[dict[str, Any]] = result["stages"]
        self.hardware = Hardware.parse(result["hardware"])
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
        label = self.stages[place]["label"]
        return read_result(self._folder.child(f"{place:02d}-{label}").path)
