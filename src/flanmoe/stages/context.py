"""What every stage is given beside its configuration and the model in hand."""

from dataclasses import dataclass
from pathlib import Path

from flanmoe.core.rundir import RunDir
from flanmoe.core.seeds import SeedTree


@dataclass(frozen=True, slots=True)
class StageContext:
    """Where a stage writes, and what it draws from.

    Attributes:
        run: the stage's own folder.
        seeds: the branch of the seed tree that is the same for every arm of a study.
        questions: the branch that evaluation questions are drawn from, the same for every arm and every
            seed of a study.
        data_dir: data folder, None where none was named.
    """

    run: RunDir
    seeds: SeedTree
    questions: SeedTree
    data_dir: Path | None

    @property
    def model_folder(self) -> Path:
        """Where a stage that changes the model saves it."""
        return self.run.path / "model"
