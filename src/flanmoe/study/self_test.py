"""A factorial study's test of itself: effects that are planted into its own scores must be found.

Whatever arms differ in is taken out of a copy first, so that what is found there is what was planted.
"""

from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.factorial import FactorialTable
from flanmoe.study.analysis.observations import Observations
from flanmoe.study.analysis.planting import PlantedEffects, recover


def self_test(
    observations: Observations, table: FactorialTable, *, seeds: SeedTree
) -> tuple[str, ...]:
    """Plant a main effect and an interaction, and say which of all effects came out as planted.

    Both are twice the largest effect that the design may miss.

    Args:
        observations: the scores of a study.
        table: its effects on one metric.
        seeds: where the draws come from.

    Returns:
        One sentence; none where no two factors are crossed, or with one seed.
    """
    pairs = [effect.factors for effect in table.interactions]
    sizes = [effect.detectable for effect in table.effects if effect.detectable is not None]
    if not pairs or not sizes:
        return ()
    (factor, other), size = pairs[0], 2 * max(sizes)
    planted = PlantedEffects(factor=factor, main=size, other=other, interaction=size)
    metric = table.metric
    found = recover(observations, metric.name, planted, seeds=seeds)
    right = sum(one.recovered for one in found)
    there = [one for one in found if one.planted]
    shown = metric.text(size, sign=False)
    verdict = "passes" if right == len(found) else "fails"
    return (
        f"The self-test of the effects on {metric.name} {verdict}: an effect of {factor} of {shown} "
        f"{metric.unit} and an interaction with {other} of {shown} were planted into a copy of the scores in "
        f"which nothing differed; {right} of {len(found)} effects came out as planted, "
        f"{sum(one.found for one in there)} of the {len(there)} that the planted ones are part of "
        "significantly so.",
    )
