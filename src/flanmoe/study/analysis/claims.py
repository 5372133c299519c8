"""`Claim`: a statement about arms as a study's file writes it, and what makes it a contrast.

A claim compares arms in one of four forms:

    better: sparse                          # sparse above dense; a list of arms counts as their mean
    than: dense

    gain: {of: sparse-flan, over: sparse}   # a difference of differences
    than_gain: {of: dense-flan, over: dense}

    effect: {factor: general, of: on, over: off, given: {shots: 0}}
    than_effect: {...}                      # optional: an interaction

    weights: {a: 1, b: -0.5, c: -0.5}       # any contrast; the weights sum to zero
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from flanmoe.core.config import Config, several
from flanmoe.core.errors import ConfigError
from flanmoe.core.names import listing, nearest_name_hint
from flanmoe.study.analysis.budget import TOLERANCE, Budget, Side
from flanmoe.study.analysis.factors import Arms, Effect, weights_of
from flanmoe.study.analysis.metric import Metric

Direction = Literal["better", "higher", "lower", "same"]
_ROUNDING = 1e-9
MINUS = "\N{MINUS SIGN}"
_FORMS = "`better` and `than`, `gain` and `than_gain`, `effect`, or `weights`"


def _tolerances(value: Any) -> Any:
    """Give budgets that are only named the usual tolerance."""
    names = (value,) if isinstance(value, str) else value
    return dict.fromkeys(names, TOLERANCE) if isinstance(names, list | tuple) else value


ArmNames = Annotated[tuple[str, ...], BeforeValidator(several)]


class Gain(Config):
    """What one thing adds to another.

    Attributes:
        of: the arm with it; several, or a pattern, count as their mean.
        over: the arm without it.
    """

    of: ArmNames
    over: ArmNames


@dataclass(frozen=True, slots=True)
class Contrast:
    """A claim's arms as numbers.

    Attributes:
        weights: weight of each arm; they sum to zero.
        sides: the arms that stand for each other where budgets are compared.
        text: what is subtracted from what.
    """

    weights: dict[str, float]
    sides: tuple[tuple[Side, Side], ...]
    text: str


class Claim(Config):
    """A statement that a study decides.

    Attributes:
        name: names it in tables.
        statement: what is claimed, in words.
        metric: what is compared.
        tasks: patterns of tasks; all tasks that the arms have where there are none.
        better, than: arms, or patterns of arms (`moe-*-direct`); `better` is claimed to be better.
        gain, than_gain: the first gain is claimed to be the larger one.
        effect, than_effect: the effect of a factor; with the second, the first is claimed to be larger.
        weights: any other contrast.
        direction: what is claimed of the contrast: `better` as the metric has it, `higher`, `lower`, or `same`:
            nearer to zero than the margin.
        margin: the smallest difference that matters, in the metric's own unit (0.02 of an accuracy is two
            percentage points).
        requires: budgets that the two sides must share, with tolerances; 5 % where they are only named.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    statement: str
    metric: str
    tasks: ArmNames = ()
    better: ArmNames | None = None
    than: ArmNames | None = None
    gain: Gain | None = None
    than_gain: Gain | None = None
    effect: Effect | None = None
    than_effect: Effect | None = None
    weights: dict[str, float] | None = None
    direction: Direction = "better"
    margin: float
    requires: Annotated[dict[Budget, float], BeforeValidator(_tolerances)] = {}

    @field_validator("margin")
    @classmethod
    def _margin_is_a_difference(cls, margin: float) -> float:
        if not 0 < margin < float("inf"):
            raise ValueError(
                f"`margin` must be above 0, as it is the smallest difference that matters, but found {margin:g}"
            )
        return margin

    @field_validator("requires")
    @classmethod
    def _tolerances_are_shares(cls, requires: dict[Budget, float]) -> dict[Budget, float]:
        for budget, tolerance in requires.items():
            if not 0 <= tolerance < 1:
                raise ValueError(
                    f"the tolerance of `{budget}` must be a share from 0 to below 1, but found {tolerance:g}"
                )
        return requires

    @field_validator("weights")
    @classmethod
    def _weights_sum_to_zero(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        total = sum((weights or {}).values())
        # Written so that a sum that is not a number is refused as well.
        if not abs(total) <= _ROUNDING:
            raise ValueError(
                f"the weights of a contrast must sum to 0, but found a sum of {total:g}"
            )
        return weights

    @model_validator(mode="after")
    def _one_form(self) -> "Claim":
        pairs = (("better", "than"), ("gain", "than_gain"))
        for first, second in pairs:
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise ValueError(
                    f"`{first}` and `{second}` go together, but found only one of them"
                )
        if self.than_effect is not None and self.effect is None:
            raise ValueError("`than_effect` goes with `effect`, but found it alone")
        forms = [self.better, self.gain, self.effect, self.weights]
        number = sum(form is not None for form in forms)
        if number != 1:
            raise ValueError(f"a claim must hold exactly one of {_FORMS}, but found {number}")
        if self.better is not None and self.direction != "better":
            raise ValueError(
                f"`better` says the direction; write the arms as `weights` for another, but found "
                f"`direction: {self.direction}`"
            )
        if self.effect is None and not any(self._fixed_weights().values()):
            raise ValueError(
                "a claim must compare different arms, but found every arm on both sides alike"
            )
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms that the claim names; none for an effect, which is about all arms with its levels."""
        return tuple(dict.fromkeys([*self._fixed_weights(), *_named(self._fixed_sides())]))

    def with_patterns_of(self, arms: Collection[str]) -> "Claim":
        """Return the claim with every pattern of arms (`moe-*-direct`) replaced by the arms that it fits.

        A pattern that fits none stays, for `check_claims` to name.
        """

        def named(side: Side | None) -> Side | None:
            if side is None:
                return None
            fitting = [_fitting(pattern, arms) for pattern in side]
            return tuple(dict.fromkeys(arm for names in fitting for arm in names))

        def gains(gain: Gain | None) -> dict[str, Any] | None:
            return None if gain is None else {"of": named(gain.of), "over": named(gain.over)}

        changed = {
            "better": named(self.better),
            "than": named(self.than),
            "gain": gains(self.gain),
            "than_gain": gains(self.than_gain),
        }
        return Claim.model_validate({**self.model_dump(), **changed})

    def contrast(self, arms: Arms) -> Contrast:
        """Return the claim's arms as numbers.

        Raises:
            ConfigError: if an effect has no matched arms.
        """
        if self.effect is None:
            weights = {arm: weight for arm, weight in self._fixed_weights().items() if weight}
            return Contrast(weights, self._fixed_sides(), self._text())
        cells = self.effect.cells(arms)
        weights = weights_of(cells)
        if self.than_effect is not None:
            others = self.than_effect.cells(arms)
            for arm, weight in weights_of(others).items():
                weights[arm] = weights.get(arm, 0.0) - weight
            cells = (*cells, *others)
        sides = tuple(((first,), (second,)) for first, second in cells)
        kept = {arm: weight for arm, weight in weights.items() if abs(weight) > _ROUNDING}
        return Contrast(kept, sides, self._text())

    def _fixed_weights(self) -> dict[str, float]:
        if self.weights is not None:
            return self.weights
        terms: list[tuple[Side, int]] = []
        if self.better and self.than:
            terms = [(self.better, 1), (self.than, -1)]
        if self.gain and self.than_gain:
            terms = [
                (self.gain.of, 1),
                (self.gain.over, -1),
                (self.than_gain.of, -1),
                (self.than_gain.over, 1),
            ]
        weights: dict[str, float] = {}
        for side, sign in terms:
            for arm in side:
                weights[arm] = weights.get(arm, 0.0) + sign / len(side)
        return {arm: 0.0 if abs(weight) < _ROUNDING else weight for arm, weight in weights.items()}

    def _fixed_sides(self) -> tuple[tuple[Side, Side], ...]:
        if self.better and self.than:
            return ((self.better, self.than),)
        if self.gain and self.than_gain:
            # What an arm gains costs something by itself: arms are compared with their likes.
            return ((self.gain.of, self.than_gain.of), (self.gain.over, self.than_gain.over))
        weights = self.weights or {}
        above = tuple(arm for arm, weight in weights.items() if weight > 0)
        below = tuple(arm for arm, weight in weights.items() if weight < 0)
        return ((above, below),)

    def _text(self) -> str:
        if self.better and self.than:
            return f"{_mean_of(self.better)} minus {_mean_of(self.than)}"
        if self.gain and self.than_gain:
            first, second = (
                f"the gain of {_mean_of(one.of)} over {_mean_of(one.over)}"
                for one in (self.gain, self.than_gain)
            )
            return f"{first} minus {second}"
        if self.effect is not None:
            other = "" if self.than_effect is None else f" minus that of {self.than_effect.text}"
            return f"the effect of {self.effect.text}{other}"
        terms = [
            f"{'+' if weight > 0 else MINUS} {abs(weight):g} × `{arm}`"
            for arm, weight in (self.weights or {}).items()
        ]
        return " ".join(terms).removeprefix("+ ")


def check_claims(
    claims: Sequence[Claim],
    *,
    arms: Arms,
    metrics: Mapping[str, Metric],
    measured: Collection[str],
    tasks: Collection[str] | None = None,
) -> None:
    """Check claims against a study, before it runs and again before it is analysed.

    Args:
        claims: all claims of the study.
        arms: every arm with its factors.
        metrics: what the names of metrics mean.
        measured: the metrics that the study measures.
        tasks: the tasks that it evaluates, None where they are not known yet.

    Raises:
        ConfigError: lists every problem.
    """
    problems = [
        problem for claim in claims for problem in _problems(claim, arms, metrics, measured)
    ]
    names = [claim.name for claim in claims]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        problems.append(
            f"{name}: claims need names of their own, but {names.count(name)} have this one."
        )
    if tasks is not None:
        problems += [
            f"{claim.name}.tasks: must name a task that is evaluated ({listing(tasks)}), but found `{pattern}`."
            for claim in claims
            for pattern in claim.tasks
            if not any(fnmatchcase(task, pattern) for task in tasks)
        ]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"claims have {count}:\n" + "\n".join(f"  {line}" for line in problems))


def _problems(
    claim: Claim, arms: Arms, metrics: Mapping[str, Metric], measured: Collection[str]
) -> list[str]:
    found = [
        f"{claim.name}: must compare arms of the study ({listing(arms)}), but found `{arm}`."
        f"{nearest_name_hint(arm, arms)}"
        for arm in claim.arms
        if arm not in arms
    ]
    if claim.effect is not None:
        try:
            claim.contrast(arms)
        except ConfigError as error:
            found.append(f"{claim.name}: {error}")
    if claim.metric not in measured:
        found.append(
            f"{claim.name}.metric: must be one that is measured ({listing(measured) or 'none is'}), but found "
            f"`{claim.metric}`.{nearest_name_hint(claim.metric, measured)}"
        )
    elif claim.direction == "better" and metrics[claim.metric].higher_is_better is None:
        found.append(
            f"{claim.name}.direction: must be `higher`, `lower` or `same` for `{claim.metric}`, of which "
            "neither more nor less is better, but found `better`."
        )
    return found


def _fitting(pattern: str, arms: Collection[str]) -> Sequence[str]:
    return [arm for arm in arms if fnmatchcase(arm, pattern)] or [pattern]


def _named(sides: tuple[tuple[Side, Side], ...]) -> list[str]:
    return [arm for pair in sides for side in pair for arm in side]


def _mean_of(side: Side) -> str:
    names = ", ".join(f"`{arm}`" for arm in side)
    return names if len(side) == 1 else f"the mean of {names}"
