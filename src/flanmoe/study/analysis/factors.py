"""Effects of factors as contrasts over arms: matched cells, main effects, interactions.

A study may describe its arms by factors (`{size: small, general: on, shots: 0}`). The effect of a factor is the
mean over matched cells: pairs of arms that differ in this factor alone. Where the rules of a study leave an arm
out, its partner is left out too, so that an incomplete grid never mixes two factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.study.analysis.observations import Factors, Level

Arms = Mapping[str, Factors]
# Strict: YAML's `on` is true and must not turn into 1.
StrictLevel = StrictBool | StrictInt | StrictFloat | StrictStr


class Effect(Config):
    """The effect of one factor, as a claim states it.

    Attributes:
        factor: name of the factor.
        of: the level whose effect is meant.
        over: the level that it is compared with.
        given: levels of other factors that the arms must have; all levels where nothing is said.
    """

    factor: str
    of: StrictLevel
    over: StrictLevel
    given: dict[str, StrictLevel] = {}

    @property
    def text(self) -> str:
        """The effect in words."""
        given = ", ".join(f"{name} {level_text(level)}" for name, level in self.given.items())
        where = f" with {given}" if given else ""
        return f"{self.factor} {level_text(self.of)} over {level_text(self.over)}{where}"

    def cells(self, arms: Arms) -> tuple[tuple[str, str], ...]:
        """Return the pairs of arms, the level's first, that differ in this factor alone.

        Raises:
            ConfigError: if no arm has such a factor or level, or no pair is left.
        """
        for name, level in {**self.given, self.factor: self.of}.items():
            _require_level(arms, name, level)
        _require_level(arms, self.factor, self.over)
        cells = _cells(arms, self)
        if not cells:
            raise ConfigError(
                f"The effect of {self.text} needs at least 1 pair of arms that differ in `{self.factor}` "
                "alone, but found 0. Add the arms, or change `given`."
            )
        return cells


def weights_of(cells: tuple[tuple[str, str], ...]) -> dict[str, float]:
    """Return the contrast whose value is the mean over cells of first minus second."""
    weights: dict[str, float] = {}
    for first, second in cells:
        weights[first] = weights.get(first, 0.0) + 1 / len(cells)
        weights[second] = weights.get(second, 0.0) - 1 / len(cells)
    return weights


@dataclass(frozen=True, slots=True)
class Interaction:
    """How much larger the effect of one factor is at one level of another than at its other level."""

    first: Effect
    second: Effect

    @property
    def text(self) -> str:
        """The interaction in words."""
        return f"{self.first.text}, and {self.second.text}"

    def weights(self, arms: Arms) -> dict[str, float] | None:
        """Return the contrast: the mean over squares of four arms of the difference of differences.

        Returns None where there is no square.
        """
        pairs = {pair[0]: pair for pair in _cells(arms, self.first)}
        squares = [
            (pairs[high], pairs[low])
            for high, low in _cells(arms, self.second)
            if high in pairs
            and low in pairs
            # The partners must be partners of each other.
            and _differ_only(arms[pairs[high][1]], arms[pairs[low][1]], self.second.factor)
        ]
        if not squares:
            return None
        weights: dict[str, float] = {}
        for (a, b), (c, d) in squares:
            for arm, sign in ((a, 1), (b, -1), (c, -1), (d, 1)):
                weights[arm] = weights.get(arm, 0.0) + sign / len(squares)
        return weights


def main_effects(arms: Arms) -> tuple[Effect, ...]:
    """Return the effect of every level of every factor over the factor's first level.

    The first level is that of the arm declared first. Levels without a matched cell are left out.
    """
    effects: list[Effect] = []
    for factor in dict.fromkeys(name for factors in arms.values() for name in factors):
        levels = levels_of(arms, factor)
        effects += [
            effect
            for level in levels[1:]
            if _cells(arms, effect := Effect(factor=factor, of=level, over=levels[0]))
        ]
    return tuple(effects)


def interactions(arms: Arms) -> tuple[Interaction, ...]:
    """Return every interaction of two factors that has at least one square of arms."""
    effects = main_effects(arms)
    found = [
        Interaction(first, second)
        for place, first in enumerate(effects)
        for second in effects[place + 1 :]
        if first.factor != second.factor
    ]
    return tuple(one for one in found if one.weights(arms) is not None)


def levels_of(arms: Arms, factor: str) -> list[Level]:
    """Return the levels of a factor in the order of the arms; True and 1 are different levels.

    Raises:
        ConfigError: if no arm has the factor.
    """
    found: dict[tuple[type, Level], None] = {}
    for factors in arms.values():
        if factor in factors:
            found[type(factors[factor]), factors[factor]] = None
    if not found:
        known = list(dict.fromkeys(name for factors in arms.values() for name in factors))
        raise ConfigError(
            f"An effect needs a factor that arms have ({listing(known) or 'there are none'}), but found "
            f"`{factor}`.{nearest_name_hint(factor, known)} Give the arms that factor."
        )
    return [level for _, level in found]


def same_level(first: Level, second: Level) -> bool:
    """Whether two levels are the same; True and 1 are not."""
    return type(first) is type(second) and first == second


def _differ_only(first: Factors, second: Factors, factor: str) -> bool:
    return first.keys() == second.keys() and all(
        same_level(first[name], second[name]) for name in first if name != factor
    )


def _cells(arms: Arms, effect: Effect) -> tuple[tuple[str, str], ...]:
    def at(level: Level) -> list[str]:
        wanted = {**effect.given, effect.factor: level}
        return [
            arm
            for arm, factors in arms.items()
            if all(
                name in factors and same_level(factors[name], value)
                for name, value in wanted.items()
            )
        ]

    return tuple(
        (first, second)
        for first, second in product(at(effect.of), at(effect.over))
        if _differ_only(arms[first], arms[second], effect.factor)
    )


def _require_level(arms: Arms, factor: str, level: Level) -> None:
    levels = levels_of(arms, factor)
    if not any(same_level(level, one) for one in levels):
        raise ConfigError(
            f"The factor `{factor}` has the levels {listing(map(level_text, levels))}, but found "
            f"`{level_text(level)}`. Add an arm with that level, or name another."
        )


def level_text(level: Level) -> str:
    """A level in words."""
    return ("on" if level else "off") if isinstance(level, bool) else str(level)
