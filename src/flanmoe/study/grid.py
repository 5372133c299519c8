"""`Grid`: arms as the crossing of factors, so that a file says once what all of them share.

    grid:
      factors:                              # the first level of a factor is the one that effects are over
        size: {small: {pretrain: {shape: {d_model: 64}}}, large: {pretrain: {shape: {d_model: 128}}}}
        general: {off: {}, on: {}}
        shots: {0: {}, 32: {few_shot: {train: {steps: 8}}}}
      stages:
        - {stage: pretrain, ...}
        - {stage: tune, label: general, when: {general: on}, ...}
        - {stage: tune, label: few_shot, when: {shots: [32]}, ...}
        - {stage: evaluate}

A level holds settings by the kind or the label of a stage; they go over those of the stage. `when` says which
cells have a stage. A cell that a rule of the study forbids is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from flanmoe.core.config import Config, merged, several
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.study.analysis.factors import StrictLevel, level_text, same_level
from flanmoe.study.analysis.observations import Level

Levels = Annotated[tuple[StrictLevel, ...], BeforeValidator(several)]
Condition = dict[str, Levels]


def holds(condition: Mapping[str, Sequence[Level]], factors: Mapping[str, Level]) -> bool:
    """Whether factors have, for each name of a condition, one of its levels; True and 1 differ."""
    return all(
        name in factors and any(same_level(factors[name], level) for level in levels)
        for name, levels in condition.items()
    )


class Rule(Config):
    """Levels that do not go together.

    Attributes:
        never: factor to a level, or to several any of which is meant; all of them at once are forbidden.
        because: the reason, in words.
    """

    never: Condition = Field(min_length=1)
    because: str = Field(min_length=1)

    @property
    def text(self) -> str:
        """The levels in words."""
        return " with ".join(
            f"{name} {' or '.join(map(level_text, levels))}" for name, levels in self.never.items()
        )


class Grid(Config):
    """Factors, their levels, and the stages that cells have.

    Attributes:
        factors: by name, the levels, each with settings by the kind or the label of a stage.
        keep: for a factor the levels that are crossed; all where nothing is said. For profiles.
        parts: factors whose levels are parts of one arm: one model for each, their scores taken together.
        model: the model that every cell starts from; that of the study where nothing is said.
        stages: in order, as in an arm, each with a condition `when` or without.
    """

    factors: dict[str, dict[StrictLevel, dict[str, dict[str, Any]] | None]] = Field(min_length=1)
    keep: Condition = {}
    parts: tuple[str, ...] = ()
    model: str | None = None
    stages: tuple[dict[str, Any], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_known(self) -> "Grid":
        for name in self.parts:
            self._require_factor(name, "parts")
        for name, levels in self.keep.items():
            self._require_levels(name, levels, "keep")
        for place, stage in enumerate(self.stages):
            for name, levels in _condition(stage).items():
                self._require_levels(name, levels, f"stages.{place}.when")
        return self

    @model_validator(mode="after")
    def _every_setting_is_used(self) -> "Grid":
        for name, levels in self.factors.items():
            for level, settings in levels.items():
                for key in settings or {}:
                    if not self._uses(name, level, key):
                        raise ValueError(
                            f"`factors.{name}.{level_text(level)}.{key}` must be the kind or the label of a "
                            "stage that cells of this level have, but no such stage is there; take it out, or "
                            "add the stage"
                        )
        return self

    def _uses(self, name: str, level: Level, key: str) -> bool:
        """Whether cells with a level of a factor have a stage of this kind or label."""
        return any(
            key in (stage.get("stage"), stage.get("label"))
            and holds({name: _condition(stage).get(name, (level,))}, {name: level})
            for stage in self.stages
        )

    def check(self, rules: Sequence[Rule]) -> None:
        """Check that rules are about factors and levels of the grid.

        Raises:
            ConfigError: names the rule and what is there; a rule that can never hold forbids nothing.
        """
        for place, rule in enumerate(rules):
            for name, levels in rule.never.items():
                try:
                    self._require_levels(name, levels, f"rules.{place}.never")
                except ValueError as error:
                    raise ConfigError(f"A rule must be about the grid: {error}.") from error

    def arms(self, rules: Sequence[Rule]) -> dict[str, dict[str, Any]]:
        """Return the arms as a study's file writes them, without the cells that a rule forbids.

        Raises:
            ConfigError: if no cell is left, or two have the same name.
        """
        found: dict[str, dict[str, Any]] = {}
        for factors in self._cells():
            if any(holds(rule.never, factors) for rule in rules):
                continue
            name = _name(factors)
            if name in found:
                raise ConfigError(
                    f"Cells of a grid need names of their own, but two are called `{name}`. Rename a level."
                )
            found[name] = self._arm(factors)
        if not found:
            raise ConfigError(
                "A grid needs a cell that no rule forbids, but all of its cells are forbidden. Change `rules` "
                "or `keep`."
            )
        return found

    def _cells(self) -> Iterator[dict[str, Level]]:
        crossed = [
            [
                level
                for level in levels
                if name not in self.keep or holds({name: self.keep[name]}, {name: level})
            ]
            for name, levels in self.factors.items()
        ]
        for levels in product(*crossed):
            yield dict(zip(self.factors, levels, strict=True))

    def _arm(self, factors: Mapping[str, Level]) -> dict[str, Any]:
        described = {name: level for name, level in factors.items() if name not in self.parts}
        arm: dict[str, Any] = {
            "factors": described,
            "stages": [
                self._stage(stage, factors)
                for stage in self.stages
                if holds(_condition(stage), factors)
            ],
        }
        if self.parts:
            arm["part_of"] = _name(described)
        return arm if self.model is None else {**arm, "model": self.model}

    def _stage(self, stage: Mapping[str, Any], factors: Mapping[str, Level]) -> dict[str, Any]:
        filled: dict[str, Any] = {key: value for key, value in stage.items() if key != "when"}
        for name, level in factors.items():
            settings = self.factors[name][level] or {}
            for key in dict.fromkeys([str(filled.get("stage")), str(filled.get("label"))]):
                filled = merged(filled, settings.get(key, {}))
        return filled

    def _require_factor(self, name: str, where: str) -> None:
        if name not in self.factors:
            raise ValueError(
                f"`{where}` must name a factor ({listing(self.factors)}), but found `{name}`."
                f"{nearest_name_hint(name, self.factors)}"
            )

    def _require_levels(self, name: str, levels: Sequence[Level], where: str) -> None:
        self._require_factor(name, where)
        known = self.factors[name]
        for level in levels:
            if not any(same_level(level, one) for one in known):
                raise ValueError(
                    f"`{where}.{name}` must be a level of it ({listing(map(level_text, known))}), but found "
                    f"`{level_text(level)}`"
                )


class _When(Config):
    """The condition of a stage."""

    when: Condition = {}


def _condition(stage: Mapping[str, Any]) -> Condition:
    return _When(when=stage.get("when", {})).when


def _name(factors: Mapping[str, Level]) -> str:
    """Name a cell by its levels: what is off is not named, and a number stands behind its factor."""
    words: list[str] = []
    for name, level in factors.items():
        if isinstance(level, bool):
            words += [name] if level else []
        elif isinstance(level, str):
            words.append(level)
        else:
            words.append(f"{name}{level}".replace(".", "_"))
    return "-".join(words) or "base"
