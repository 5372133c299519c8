"""`Study`: arms times seeds of recipes, as data, and how a file becomes one.

A file with `stages:` is a recipe: a study of one arm. A file with `arms:` is a study; what its arms share
stands once under `model:` and `defaults:` (one block a stage kind, merged under every stage of that kind):

    name: quickstart
    model: smollm2-135m-instruct
    defaults:
      tune: {data: {...}, train: {steps: 32}}
    arms:
      dense:  {stages: [{stage: tune}]}
      sparse: {stages: [{stage: upcycle}, {stage: tune}]}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, field_validator, model_validator

from flanmoe.core.config import Config, apply_overrides, read_yaml, set_values
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.stages.recipe import (
    EvaluateStage,
    Recipe,
    StageDefaults,
    Stages,
    require_a_start,
)


class Arm(Config):
    """One recipe of a study.

    Attributes:
        model: the model that the arm starts from; None where its first stage makes one.
        stages: what is done to it.
    """

    model: str | None = None
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
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)
    baseline: str = ""

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


def load_study(path: Path, *, overrides: Sequence[str] = (), profile: str | None = None) -> Study:
    """Read a recipe or a study from a YAML file.

    A profile is a named set of dotted keys in the file (`profiles: {smoke: {defaults.tune.train.steps: 2}}`)
    whose values are taken as they stand there; `overrides` come after it and win.

    Raises:
        ConfigError: lists every problem with its dotted path.
    """
    return study_from_mapping(
        read_yaml(path), overrides=overrides, profile=profile, origin=str(path)
    )


def study_from_mapping(
    values: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    profile: str | None = None,
    origin: str = "study",
) -> Study:
    """Build a study from the plain values of a file; see `load_study`."""
    changes = _profile(values, profile, origin)
    written = {key: value for key, value in values.items() if key != "profiles"}
    values = apply_overrides(set_values(written, changes), overrides)
    if "stages" in values and "arms" not in values:
        recipe = Recipe.parse(values, origin=origin)
        arm = Arm(model=recipe.model, stages=recipe.stages)
        return Study(
            name=recipe.name,
            description=recipe.description,
            seeds=(recipe.seed,),
            arms={recipe.name.replace(".", "-"): arm},
        )
    defaults = _part(_Defaults, values, origin).defaults.given
    values.pop("defaults", None)
    study = Study.parse(_with_defaults(values, defaults), origin=origin)
    _check_every_default_is_used(study, defaults, origin)
    return study


class _Profiles(Config):
    """Named sets of dotted keys to values."""

    profiles: dict[str, dict[str, Any]] = {}


class _Defaults(Config):
    """What the stages of all arms share."""

    defaults: StageDefaults = StageDefaults()


_Part = TypeVar("_Part", bound=Config)


def _part(kind: type[_Part], values: Mapping[str, Any], origin: str) -> _Part:
    """Validate the one part of a file that is not the study itself; nothing there is nothing said."""
    (field,) = kind.model_fields
    given = values.get(field)
    return kind.parse({} if given is None else {field: given}, origin=origin)


def _profile(values: Mapping[str, Any], profile: str | None, origin: str) -> dict[str, Any]:
    profiles = _part(_Profiles, values, origin).profiles
    if profile is None:
        return {}
    if profile not in profiles:
        raise ConfigError(
            f"{origin} has no profile `{profile}`.{nearest_name_hint(profile, profiles)} "
            f"Known: {listing(profiles) or 'none'}."
        )
    return profiles[profile]


def _check_every_default_is_used(
    study: Study, defaults: Mapping[str, Mapping[str, Any]], origin: str
) -> None:
    used = {stage.stage for arm in study.arms.values() for stage in arm.stages}
    for kind in defaults:
        if kind not in used:
            raise ConfigError(
                f"{origin} has 1 problem:\n  defaults.{kind}: has no effect: every arm lacks a stage "
                f"`{kind}`. Take it out, or add the stage."
            )


def _with_defaults(
    values: dict[str, Any], defaults: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Spread `model` and `defaults` into the arms, leaving wrong shapes for validation to name."""
    model = values.pop("model", None)
    arms = values.get("arms")
    if not isinstance(arms, dict):
        return values
    return {**values, "arms": {name: _fill(arm, model, defaults) for name, arm in arms.items()}}


def _fill(arm: Any, model: Any, defaults: Mapping[str, Mapping[str, Any]]) -> Any:
    if not isinstance(arm, dict):
        return arm
    filled = dict(arm)
    if model is not None:
        filled.setdefault("model", model)
    if isinstance(arm.get("stages"), list):
        filled["stages"] = [
            _merged(defaults.get(str(stage.get("stage")), {}), stage)
            if isinstance(stage, dict)
            else stage
            for stage in arm["stages"]
        ]
    return filled


def _merged(base: Any, over: Any) -> Any:
    """Merge mappings deeply; anything else in `over` replaces what is in `base`."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {
            key: _merged(base[key], over[key])
            if key in base and key in over
            else over.get(key, base.get(key))
            for key in {**base, **over}
        }
    return over
