"""`Study`: arms times seeds of recipes, and the claims that they are to decide, as data.

`study_file` makes one of a file.
"""

from collections.abc import Collection

from pydantic import Field, field_validator, model_validator

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing
from flanmoe.stages.recipe import (
    EvaluateStage,
    Recipe,
    Stages,
    require_a_start,
)
from flanmoe.study.analysis.claims import Claim, check_claims
from flanmoe.study.analysis.factors import StrictLevel
from flanmoe.study.analysis.metric import METRICS
from flanmoe.study.analysis.observations import Level
from flanmoe.study.grid import Rule, holds


class Arm(Config):
    """One recipe of a study.

    Attributes:
        model: the model that the arm starts from; None where its first stage makes one.
        description: what is to be known about it beside its stages, for the report.
        factors: levels of the factors that describe it, for claims about effects and for the rules.
        part_of: a name under which the scores of several arms are taken together, each on tasks of its own:
            one model for each task; its own name unless it is set.
        stages: what is done to it.
    """

    model: str | None = None
    description: str = ""
    factors: dict[str, StrictLevel] = {}
    part_of: str = ""
    stages: Stages

    @model_validator(mode="after")
    def _there_is_a_model(self) -> "Arm":
        require_a_start(self.model, self.stages)
        return self


class Study(Config):
    """Arms that are run with the same seeds and compared on the same examples.

    Attributes:
        name: names the run folder.
        description: one sentence for the report.
        seeds: every arm runs once with each.
        arms: name to arm.
        baseline: the arm that the others are compared with; the first one unless named.
        rules: levels of factors that do not go together in any arm.
        claims: what the study is to decide.
        max_parameters: a plan with a larger model is refused; None for no limit.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)
    baseline: str = ""
    rules: tuple[Rule, ...] = ()
    claims: tuple[Claim, ...] = ()
    max_parameters: int | None = Field(default=None, ge=1)

    @field_validator("arms")
    @classmethod
    def _arm_names_are_folder_names(cls, arms: dict[str, Arm]) -> dict[str, Arm]:
        for name in arms:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"an arm's name may hold letters, digits, `-` and `_`, but found `{name}`"
                )
        return arms

    @field_validator("seeds")
    @classmethod
    def _seeds_are_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be distinct, but found {list(seeds)}")
        return seeds

    @model_validator(mode="after")
    def _baseline_is_an_arm(self) -> "Study":
        if self.baseline and self.baseline not in self.arms:
            raise ValueError(
                f"`baseline` must name an arm ({listing(self.arms)}), but found `{self.baseline}`"
            )
        return self

    @model_validator(mode="after")
    def _rules_allow_every_arm(self) -> "Study":
        for name, arm in self.arms.items():
            broken = [rule for rule in self.rules if holds(rule.never, arm.factors)]
            if broken:
                raise ValueError(
                    f"arm `{name}` has {broken[0].text}, which a rule forbids: {broken[0].because}; change its "
                    "`factors`, or take it out"
                )
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> "Study":
        for name, parts in self.systems.items():
            if any(self.arms[part].factors != self.arms[parts[0]].factors for part in parts):
                raise ValueError(
                    f"arms that are parts of `{name}` must have the same `factors`, but {listing(parts)} differ"
                )
            self._require_tasks_of_their_own(name, parts)
        return self

    def _require_tasks_of_their_own(self, name: str, parts: tuple[str, ...]) -> None:
        tasks = [
            task.identity
            for part in parts
            for stage in self.evaluations(part)[-1:]
            for task in stage.listed
        ]
        twice = [task for task in dict.fromkeys(tasks) if tasks.count(task) > 1]
        if len(parts) > 1 and twice:
            raise ValueError(
                f"arms that are parts of `{name}` must be scored on tasks of their own, but {listing(parts)} "
                f"share `{twice[0]}`"
            )

    @model_validator(mode="after")
    def _claims_can_be_judged(self) -> "Study":
        try:
            self.check_claims(measured=[metric.name for metric in METRICS])
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def check_claims(
        self, *, measured: Collection[str], tasks: Collection[str] | None = None
    ) -> None:
        """Check that every claim can be judged by what is measured.

        Args:
            measured: the metrics that evaluations measure.
            tasks: the tasks that they score, None where they are not known yet.

        Raises:
            ConfigError: lists every problem.
        """
        metrics = {metric.name: metric for metric in METRICS}
        check_claims(
            self.resolved_claims,
            arms=self.factors,
            metrics=metrics,
            measured=measured,
            tasks=tasks,
        )

    @property
    def resolved_claims(self) -> tuple[Claim, ...]:
        """The claims with patterns of arms replaced by the arms that they fit."""
        return tuple(claim.with_patterns_of(self.systems) for claim in self.claims)

    @property
    def systems(self) -> dict[str, tuple[str, ...]]:
        """What claims are about: the arms that are parts of one, by its name; an arm by itself by its own."""
        found: dict[str, tuple[str, ...]] = {}
        for name, arm in self.arms.items():
            system = arm.part_of or name
            found[system] = (*found.get(system, ()), name)
        return found

    @property
    def factors(self) -> dict[str, dict[str, Level]]:
        """The factors of each system."""
        return {name: dict(self.arms[parts[0]].factors) for name, parts in self.systems.items()}

    @property
    def baseline_arm(self) -> str:
        """Name of the arm that the others are compared with."""
        return self.baseline or next(iter(self.arms))

    @property
    def jobs(self) -> tuple[tuple[str, int], ...]:
        """Arm and seed of every run, in the order in which they run."""
        return tuple((arm, seed) for seed in self.seeds for arm in self.arms)

    def recipe(self, arm: str, seed: int) -> Recipe:
        """Return one arm with one seed as a recipe."""
        chosen = self.arms[arm]
        return Recipe(
            name=f"{self.name}-{arm}",
            description=self.description,
            model=chosen.model,
            seed=seed,
            stages=chosen.stages,
        )

    def evaluations(self, arm: str) -> tuple[EvaluateStage, ...]:
        """Return the evaluation stages of an arm in order."""
        return tuple(stage for stage in self.arms[arm].stages if isinstance(stage, EvaluateStage))
