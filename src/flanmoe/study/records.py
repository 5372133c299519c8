"""What the stages of one arm and seed left on disk, read back."""

from pathlib import Path
from typing import Any

from flanmoe.core.errors import RunError
from flanmoe.core.rundir import RunDir
from flanmoe.evaluation.results import SuiteResult, read_result
from flanmoe.models.flops import FlopCount
from flanmoe.models.plan import ParameterCount
from flanmoe.stages.tune import TuneStageResult
from flanmoe.stages.upcycle import UpcycleResult
from flanmoe.study.executor import RESULT_FILE, Job
from flanmoe.study.report_data import Flops, Parameters


class SeedResults:
    """What one arm recorded with one seed: its stages by kind, in order."""

    def __init__(self, study_dir: Path, arm: str, seed: int) -> None:
        self.seed = seed
        folder = RunDir(Job(study_dir, arm, seed, None).folder)
        result = folder.read_json(RESULT_FILE)
        self.seconds: float = result["seconds"]
        self.stages: list[dict[str, Any]] = result["stages"]
        self._model: Any = result.get("model")
        self._folder = folder

    def _details(self, kind: str) -> list[tuple[int, dict[str, Any]]]:
        return [(i, stage) for i, stage in enumerate(self.stages) if stage["stage"] == kind]

    @property
    def upcycled(self) -> UpcycleResult | None:
        """The last upcycling, None where there was none."""
        found = self._details("upcycle")
        return UpcycleResult.parse(found[-1][1]["details"]) if found else None

    @property
    def tuned(self) -> TuneStageResult | None:
        """The last tuning, None where there was none."""
        found = self._details("tune")
        return TuneStageResult.parse(found[-1][1]["details"]) if found else None

    @property
    def tune_stage(self) -> dict[str, Any] | None:
        """The record of the last tuning stage."""
        found = self._details("tune")
        return found[-1][1] if found else None

    def untuned_size(self) -> tuple[Parameters, Flops]:
        """Parameters and FLOPs of the model that an arm without tuning ends with.

        Raises:
            RunError: if an older version wrote the result.
        """
        if self._model is None:
            raise RunError(
                f"The result in {self._folder.path} must hold the size of the model, but an older version "
                "wrote it. Run the study again."
            )
        counts = ParameterCount.parse(self._model["parameters"])
        flops = FlopCount.parse(self._model["flops"])
        # Nothing is changed where nothing is tuned.
        return Parameters(total=counts.total, active=counts.active, trainable=0), flops_of(flops)

    @property
    def rejected(self) -> dict[str, int]:
        """Records that were left out of each task because they cannot be read."""
        return {
            task: number
            for stage in self.stages
            for task, number in stage["details"].get("rejected", {}).items()
        }

    @property
    def evaluation_only(self) -> set[str]:
        """Evaluated tasks whose authors ask that nothing is trained on them."""
        found = self._details("evaluate")
        return {name for _, stage in found for name in stage["details"]["evaluation_only"]}

    def evaluation(self, *, after: bool) -> SuiteResult | None:
        """The first evaluation before any tuning, or the last one after it; with its examples."""
        tuned = self._details("tune")
        first_tuning = tuned[0][0] if tuned else len(self.stages)
        chosen = [
            (i, stage) for i, stage in self._details("evaluate") if (i > first_tuning) == after
        ]
        if not chosen:
            return None
        number, stage = chosen[-1] if after else chosen[0]
        return read_result(self._folder.child(f"{number:02d}-{stage['label']}").path)


def flops_of(count: FlopCount) -> Flops:
    """Return a count as a report shows it."""
    return Flops(
        body=count.body,
        head=count.head,
        attention_scores=count.attention_scores,
        context_length=count.context_length,
    )
