"""All factorial effects of a study whose arms are described by factors, with both readings of relative gain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError, DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.contrast import ContrastEstimate, estimate_contrasts
from flanmoe.study.analysis.factors import Arms, Effect, interactions, main_effects, weights_of
from flanmoe.study.analysis.holm import holm
from flanmoe.study.analysis.metric import Metric
from flanmoe.study.analysis.observations import Observations
from flanmoe.study.analysis.pairing import Paired, pair
from flanmoe.study.analysis.power import detectable
from flanmoe.study.analysis.relative_gain import mean_of_ratios, ratio_of_means
from flanmoe.study.analysis.verdict import ALPHA

LEAST_BASELINE = 0.01


class RelativeGain(Config):
    """A gain relative to the baseline, by both readings; a share (0.31 is 31 %).

    Attributes:
        ratio_of_means, mean_of_ratios: None where it has no meaning.
        reasons: why one has none.
    """

    ratio_of_means: float | None
    mean_of_ratios: float | None
    reasons: tuple[str, ...] = ()


class EffectResult(Config):
    """One effect, in the metric's own unit.

    Attributes:
        name: the effect in words.
        factors: the one or two factors.
        metric: what was measured.
        weights: weight of each arm that enters it.
        estimate, standard_error: over seeds and examples.
        degrees_of_freedom: of the standard error.
        low, high: interval at 95 %, not corrected for the other effects.
        p, p_holm: two-sided p-value, and the same by Holm over all effects of the table; None where all
            differences are equal.
        detectable: minimum detectable effect at the level alpha / number of effects; None with one seed.
        relative: relative gain over cells of task and pair of arms; None for an interaction.
    """

    name: str
    factors: tuple[str, ...]
    metric: Metric
    weights: dict[str, float]
    estimate: float
    standard_error: float
    degrees_of_freedom: float
    low: float
    high: float
    p: float | None
    p_holm: float | None
    detectable: float | None
    relative: RelativeGain | None


class FactorialTable(Config):
    """All effects of one metric.

    Attributes:
        effects: main effects, then interactions of two factors.
        num_arms: arms with scores.
        failed: arms that are declared and have none; they and what they alone are matched with are left out.
        left_out: sentences about seeds and examples that not all arms have.
    """

    effects: tuple[EffectResult, ...]
    num_arms: int
    failed: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def metric(self) -> Metric:
        """What all effects are effects on."""
        return self.effects[0].metric

    @property
    def mains(self) -> tuple[EffectResult, ...]:
        """The effects of one factor each."""
        return tuple(effect for effect in self.effects if len(effect.factors) == 1)

    @property
    def interactions(self) -> tuple[EffectResult, ...]:
        """The interactions of two factors."""
        return tuple(effect for effect in self.effects if len(effect.factors) > 1)


@dataclass(frozen=True, slots=True)
class _Contrast:
    name: str
    factors: tuple[str, ...]
    weights: Mapping[str, float]
    cells: tuple[tuple[str, str], ...] = ()


def factorial_effects(
    observations: Observations, metric: str, *, tasks: Sequence[str] = (), seeds: SeedTree
) -> FactorialTable:
    """Estimate every main effect and every interaction of two factors.

    The effect of a level is over the factor's first level (that of the arm declared first), as the mean over
    matched cells; an interaction is the mean of differences of differences, not halved. An effect "on top of"
    another, as in an additional gain, is a claim with `given`.

    Args:
        observations: scores and arms with their factors.
        metric: name of the metric.
        tasks: patterns of tasks; all where there are none.
        seeds: where the draws come from.

    Raises:
        ConfigError: if the arms have no factor with two levels.
        DataError: if the arms have nothing in common.
    """
    arms = {
        arm: factors for arm, factors in observations.arms.items() if observations.has(metric, arm)
    }
    contrasts = _contrasts(arms)
    if not contrasts:
        raise ConfigError(
            "Factorial effects need arms that differ in one factor alone, but found 0 such pairs among "
            f"{len(arms)} arms with `{metric}`. Give the arms `factors`."
        )
    paired = pair(observations, metric, tuple(arms), tasks=tasks)
    found = estimate_contrasts(paired, [one.weights for one in contrasts], seeds=seeds)
    return FactorialTable(
        effects=_results(paired, contrasts, found),
        num_arms=len(arms),
        failed=tuple(arm for arm in observations.arms if arm not in arms),
        left_out=paired.left_out,
    )


def _contrasts(arms: Arms) -> list[_Contrast]:
    mains: list[tuple[Effect, tuple[tuple[str, str], ...]]] = [
        (effect, effect.cells(arms)) for effect in main_effects(arms)
    ]
    found = [
        _Contrast(effect.text, (effect.factor,), weights_of(cells), cells)
        for effect, cells in mains
    ]
    for one in interactions(arms):
        weights = one.weights(arms)
        if weights is not None:
            found.append(_Contrast(one.text, (one.first.factor, one.second.factor), weights))
    return found


def _results(
    paired: Paired, contrasts: Sequence[_Contrast], found: Sequence[ContrastEstimate]
) -> tuple[EffectResult, ...]:
    tested = [place for place, estimate in enumerate(found) if not estimate.is_constant]
    p_values = {place: found[place].p_value() for place in tested}
    corrected = dict(zip(tested, holm(list(p_values.values())), strict=True))
    level = ALPHA / max(len(tested), 1)
    return tuple(
        EffectResult(
            name=one.name,
            factors=one.factors,
            metric=paired.metric,
            weights={arm: weight for arm, weight in one.weights.items() if weight},
            estimate=estimate.mean,
            standard_error=estimate.standard_error,
            degrees_of_freedom=estimate.degrees,
            low=estimate.low,
            high=estimate.high,
            p=p_values.get(place),
            p_holm=corrected.get(place),
            detectable=detectable(estimate, level=level),
            relative=_relative(paired, one.cells) if one.cells else None,
        )
        for place, (one, estimate) in enumerate(zip(contrasts, found, strict=True))
    )


def _relative(paired: Paired, cells: Sequence[tuple[str, str]]) -> RelativeGain:
    means = _task_means(paired)
    index = {arm: place for place, arm in enumerate(paired.arms)}
    with_it = np.concatenate([means[index[first]] for first, _ in cells])
    without = np.concatenate([means[index[second]] for _, second in cells])
    values: list[float | None] = []
    reasons: list[str] = []
    for gain in (ratio_of_means, mean_of_ratios):
        try:
            values.append(gain(with_it, without, least_baseline=LEAST_BASELINE))
        except DataError as error:
            values.append(None)
            reasons.append(f"{gain.__name__.replace('_', ' ')}: {error}")
    return RelativeGain(ratio_of_means=values[0], mean_of_ratios=values[1], reasons=tuple(reasons))


def _task_means(paired: Paired) -> Float[np.ndarray, "A T"]:
    """Mean over seeds and examples, by arm and task."""
    over_seeds = paired.scores.mean(axis=1)
    tasks = np.asarray([task for task, _ in paired.examples])
    return np.stack([over_seeds[:, tasks == task].mean(axis=1) for task in paired.tasks], axis=1)
