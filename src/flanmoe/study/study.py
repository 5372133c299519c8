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
from typing import Any

from pydantic import Field, field_validator, model_validator

from flanmoe.core.config import Config, apply_overrides, read_yaml
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.stages.recipe import STAGE_KINDS, EvaluateStage, Recipe, Stages


class Arm(Config):
    """One recipe of a study.

    Attributes:
        model: the model that the arm starts from.
        stages: what is done to it.
    """

    model: str
    stages: Stages


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

    A profile is a named set of dotted overrides in the file (`profiles: {smoke: {defaults.tune.train.steps:
    2}}`); `overrides` come after it and win.

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
    values = dict(values)
    profiles = values.pop("profiles", None) or {}
    values = apply_overrides(values, [*_profile_overrides(profiles, profile, origin), *overrides])
    if "stages" in values and "arms" not in values:
        recipe = Recipe.parse(values, origin=origin)
        arm = Arm(model=recipe.model, stages=recipe.stages)
        return Study(
            name=recipe.name,
            description=recipe.description,
            seeds=(recipe.seed,),
            arms={recipe.name.replace(".", "-"): arm},
        )
    return Study.parse(_with_defaults(values, origin), origin=origin)


def _profile_overrides(profiles: Any, profile: str | None, origin: str) -> list[str]:
    if profile is None:
        return []
    if not isinstance(profiles, dict) or profile not in profiles:
        known = list(profiles) if isinstance(profiles, dict) else []
        raise ConfigError(
            f"{origin} has no profile `{profile}`.{nearest_name_hint(profile, known)} "
            f"Known: {listing(known) or 'none'}."
        )
    return [f"{key}={value}" for key, value in profiles[profile].items()]


def _with_defaults(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Spread `model` and `defaults` into the arms, leaving wrong shapes for validation to name."""
    defaults = values.pop("defaults", None) or {}
    model = values.pop("model", None)
    for kind in defaults:
        if kind not in STAGE_KINDS:
            raise ConfigError(
                f"{origin} has 1 problem:\n  defaults.{kind}: unknown stage kind `{kind}`."
                f"{nearest_name_hint(kind, STAGE_KINDS)} Known: {listing(STAGE_KINDS)}."
            )
    arms = values.get("arms")
    if not isinstance(arms, dict):
        return values
    return {**values, "arms": {name: _fill(arm, model, defaults) for name, arm in arms.items()}}


def _fill(arm: Any, model: Any, defaults: dict[str, Any]) -> Any:
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
