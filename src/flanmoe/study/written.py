"""A study as its author wrote it: the text of its file and what the command line changed.

`recipe.yaml` of a run is the study with everything resolved, which nobody reads where arms are crossed.
"""

from flanmoe.core.config import Config
from flanmoe.core.rundir import RunDir

WRITTEN_FILE = "written.json"


class WrittenStudy(Config):
    """The files of a study and how they were started.

    Attributes:
        files: text by file name, the study's own first, then those that it includes.
        profile: the profile that was asked for, None for none.
        overrides: changes from the command line.
    """

    files: dict[str, str]
    profile: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def options(self) -> str:
        """What stood on the command line, empty where nothing did."""
        words = [f"--profile {self.profile}"] if self.profile else []
        return " ".join([*words, *(f"--set {change}" for change in self.overrides)])


def written_study(run: RunDir) -> WrittenStudy:
    """Return what a run's folder keeps of how its study was written; of one from Python its resolved recipe."""
    if run.has(WRITTEN_FILE):
        return WrittenStudy.parse(run.read_json(WRITTEN_FILE), origin=WRITTEN_FILE)
    recipe = run.file("recipe.yaml")
    return WrittenStudy(files={recipe.name: recipe.read_text(encoding="utf-8")})
