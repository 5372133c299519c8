"""How a file becomes a study.

A file with `stages:` is a recipe: a study of one arm. A file with `arms:` or a `grid:` (see `grid`) is a study;
what its arms share stands once under `model:` and `defaults:` (one block a stage kind, merged under every stage
of that kind):

    name: quickstart
    model: smollm2-135m-instruct
    defaults:
      tune: {data: {...}, train: {steps: 32}}
    arms:
      dense:  {stages: [{stage: tune}]}
      sparse: {stages: [{stage: upcycle}, {stage: tune}]}

A file with `include:` takes the arms and the claims of other files (see `included`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flanmoe.core.config import Config, apply_overrides, merged, read_yaml, set_values
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.stages.recipe import Recipe, StageDefaults
from flanmoe.study.grid import Grid, Rule
from flanmoe.study.included import arms_of, claims_of
from flanmoe.study.study import Arm, Study
from flanmoe.study.written import WrittenStudy


def load_study(path: Path, *, overrides: Sequence[str] = (), profile: str | None = None) -> Study:
    """Read a recipe or a study from a YAML file.

    A profile is a named set of dotted keys in the file (`profiles: {smoke: {defaults.tune.train.steps: 2}}`)
    whose values are taken as they stand there; `overrides` come after it and win.

    Raises:
        ConfigError: lists every problem with its dotted path.
    """
    return _loaded(path, overrides=overrides, profile=profile, inside=())


def _loaded(
    path: Path, *, overrides: Sequence[str], profile: str | None, inside: tuple[Path, ...]
) -> Study:
    values = read_yaml(path)
    if path.resolve() in inside:
        raise ConfigError(f"A study cannot include itself, but {path} is inside itself.")
    files, own = _included(path, values), (*inside, path.resolve())
    studies = [_loaded(file, overrides=(), profile=profile, inside=own) for file in files]
    rest = {key: value for key, value in values.items() if key != "include"}
    if studies:
        _check_reaches_included(rest, overrides, str(path))
        rest = _with_included(rest, studies, str(path))
    return study_from_mapping(rest, overrides=overrides, profile=profile, origin=str(path))


def _check_reaches_included(
    values: Mapping[str, Any], overrides: Sequence[str], origin: str
) -> None:
    """Refuse what would have no effect on arms that are taken as they are."""
    changed = [override.partition("=")[0].partition(".")[0] for override in overrides]
    for key in (*values, *changed):
        if key in _NOT_BESIDE_INCLUDE:
            raise ConfigError(
                f"{origin} has 1 problem:\n  {key}: has no effect on included arms, which are complete; change "
                "them in their own files, or one by one as `arms.NAME.stages.0...`."
            )


def as_written(path: Path, *, profile: str | None, overrides: Sequence[str]) -> WrittenStudy:
    """Return the text of a study's file, with the files that it includes, and what changed it."""
    texts = {one.name: one.read_text(encoding="utf-8") for one in (path, *_all_included(path))}
    return WrittenStudy(files=texts, profile=profile, overrides=tuple(overrides))


def _all_included(path: Path) -> list[Path]:
    own = _included(path, read_yaml(path))
    return [found for file in own for found in (file, *_all_included(file))]


def _included(path: Path, values: Mapping[str, Any]) -> list[Path]:
    return [path.parent / file for file in _part(_Including, values, str(path)).include]


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
    if "stages" in values and not {"arms", "grid"}.intersection(values):
        recipe = Recipe.parse(values, origin=origin)
        arm = Arm(model=recipe.model, stages=recipe.stages)
        return Study(
            name=recipe.name,
            description=recipe.description,
            seeds=(recipe.seed,),
            arms={recipe.name.replace(".", "-"): arm},
        )
    defaults = _part(_Defaults, values, origin).defaults.given
    values = _with_grid(values, origin)
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


class _Including(Config):
    """Other files, relative to the one that names them, whose arms and claims a study takes."""

    include: tuple[str, ...] = ()


class _Crossed(Config):
    """Arms that a file does not list but cross."""

    grid: Grid | None = None


class _Ruled(Config):
    """What crossing leaves out."""

    rules: tuple[Rule, ...] = ()


_Part = TypeVar("_Part", bound=Config)
_NOT_BESIDE_INCLUDE = frozenset({"defaults", "model", "grid", "rules"})


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


def _with_included(values: dict[str, Any], studies: Sequence[Study], origin: str) -> dict[str, Any]:
    """Put the arms and claims of other studies before those of a file."""
    arms: dict[str, Any] = {}
    claims: list[Any] = []
    for taken in (*map(arms_of, studies), values.get("arms") or {}):
        both = sorted(set(arms).intersection(taken))
        if both:
            raise ConfigError(
                f"{origin} has 1 problem:\n  arms.{both[0]}: stands in two of the files; give one of them "
                "another name."
            )
        arms |= taken
    for study in studies:
        claims += claims_of(study)
    return {**values, "arms": arms, "claims": [*claims, *(values.get("claims") or [])]}


def _with_grid(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Put the arms of a grid before those that the file lists."""
    grid = _part(_Crossed, values, origin).grid
    rest = {key: value for key, value in values.items() if key != "grid"}
    listed = rest.get("arms", {})
    if grid is None or not isinstance(listed, dict):
        return rest
    rules = _part(_Ruled, values, origin).rules
    grid.check(rules)
    crossed = grid.arms(rules)
    both = sorted(set(crossed).intersection(listed))
    if both:
        raise ConfigError(
            f"{origin} has 1 problem:\n  arms.{both[0]}: is a cell of the grid as well; give it another name."
        )
    return {**rest, "arms": {**crossed, **listed}}


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
            merged(defaults.get(str(stage.get("stage")), {}), stage)
            if isinstance(stage, dict)
            else stage
            for stage in arm["stages"]
        ]
    return filled
