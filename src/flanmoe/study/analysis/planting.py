"""Planted effects in copies of a study's observations: the self-test of a study.

Whatever the arms really differ in is taken out, known effects are put in, and the analysis has to find them.
"""

from collections.abc import Mapping

from scipy import stats

from flanmoe.core.config import Config
from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.factorial import EffectResult, factorial_effects
from flanmoe.study.analysis.factors import Arms, levels_of
from flanmoe.study.analysis.observations import Factors, Observation, Observations
from flanmoe.study.analysis.pairing import pair
from flanmoe.study.analysis.verdict import ALPHA
from flanmoe.study.analysis.wild import null_copies

# Wide enough that not one study in a thousand fails its self-test by chance.
_COVERAGE = 0.999


class PlantedEffects(Config):
    """Effects to plant into a factorial study, in the metric's own unit.

    Attributes:
        factor: the factor with a main effect.
        main: the effect of each of its levels over its first one.
        other: a factor that it interacts with.
        interaction: what the effect is larger by at each level of the other factor but its first.
    """

    factor: str
    main: float
    other: str
    interaction: float


class Recovered(Config):
    """What the analysis found of one effect in a planted copy.

    Attributes:
        effect: what was found.
        planted: what was to be found. A main effect is a mean over matched cells, so that its share of a
            planted interaction is in it: half in a full two-level grid.
        covered: whether the planted size lies in the 99.9 % t interval.
        found: whether the effect is significant after Holm's correction.
    """

    effect: EffectResult
    planted: float
    covered: bool
    found: bool

    @property
    def recovered(self) -> bool:
        """Whether the estimate agrees with what was planted, and what the design can detect was found."""
        smallest = self.effect.detectable
        detectable = smallest is not None and abs(self.planted) >= smallest
        return self.covered and (self.found or not detectable)


def plant(
    observations: Observations, metric: str, sizes: Mapping[str, float], *, seeds: SeedTree
) -> Observations:
    """Return observations of one metric in which the arms differ by `sizes` and by chance alone.

    Every arm gets the mean score of all arms on each stratum of examples plus its size; seeds and examples move
    it as they did, up or down at random.

    Args:
        observations: the scores of a study.
        metric: the metric to copy.
        sizes: what is added to each arm; 0 for an arm that is not named.
        seeds: where the draws come from.

    Raises:
        DataError: if the arms have nothing in common.
    """
    arms = tuple(arm for arm in observations.arms if observations.has(metric, arm))
    paired = pair(observations, metric, arms)
    parts = paired.scores * paired.strata.weights
    copy = null_copies(parts, paired.strata, num_copies=1, draws=seeds.numpy())[0]
    copy /= paired.strata.weights
    middle = paired.strata.means(paired.scores.mean(axis=(0, 1)))[paired.strata.of_example]
    return Observations(
        (
            Observation(
                arm, seed, task, key, metric, float(copy[a, s, i] + middle[i] + sizes.get(arm, 0.0))
            )
            for a, arm in enumerate(arms)
            for s, seed in enumerate(paired.seeds)
            for i, (task, key) in enumerate(paired.examples)
        ),
        arms=observations.arms,
        metrics=observations.metrics.values(),
    )


def recover(
    observations: Observations, metric: str, planted: PlantedEffects, *, seeds: SeedTree
) -> tuple[Recovered, ...]:
    """Plant a main effect and an interaction into a copy of a factorial study, and look for every effect.

    Returns:
        All effects of the study: those planted, those that a planted one is part of, and those that are zero.

    Raises:
        ConfigError: if the arms have no such factors.
    """
    arms = {
        arm: factors for arm, factors in observations.arms.items() if observations.has(metric, arm)
    }
    sizes = _sizes(arms, planted)
    copy = plant(observations, metric, sizes, seeds=seeds.child("plant"))
    table = factorial_effects(copy, metric, seeds=seeds.child("effects"))
    return tuple(_recovered(effect, sizes) for effect in table.effects)


def _sizes(arms: Arms, planted: PlantedEffects) -> dict[str, float]:
    first = {name: levels_of(arms, name)[0] for name in (planted.factor, planted.other)}

    def moved(factors: Factors, name: str) -> bool:
        return name in factors and factors[name] != first[name]

    return {
        arm: moved(factors, planted.factor)
        * (planted.main + planted.interaction * moved(factors, planted.other))
        for arm, factors in arms.items()
    }


def _recovered(effect: EffectResult, sizes: Mapping[str, float]) -> Recovered:
    planted = sum(weight * sizes[arm] for arm, weight in effect.weights.items())
    reach = stats.t.ppf((1 + _COVERAGE) / 2, effect.degrees_of_freedom) * effect.standard_error
    return Recovered(
        effect=effect,
        planted=planted,
        covered=bool(abs(effect.estimate - planted) <= reach),
        found=effect.p_holm is not None and effect.p_holm <= ALPHA,
    )
