"""What the factors of a study do to each metric, checked by planting effects into its own scores."""

from flanmoe.core.errors import DataError
from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.factorial import FactorialTable, factorial_effects
from flanmoe.study.analysis.factors import main_effects
from flanmoe.study.analysis.observations import Observations
from flanmoe.study.observed import complete
from flanmoe.study.self_test import self_test


def factor_effects(
    observations: Observations, *, seeds: SeedTree
) -> tuple[tuple[FactorialTable, ...], list[str]]:
    """Return the effects on every metric, and sentences about them: what each self-test says.

    There are none where no two arms differ in one factor alone, and a sentence in their place where arms have
    nothing in common: a report must not be lost for that.
    """
    tables: list[FactorialTable] = []
    sentences: list[str] = []
    for metric in observations.measured():
        scores = complete(observations, metric)
        arms = {arm: factors for arm, factors in scores.arms.items() if scores.has(metric, arm)}
        if not main_effects(arms):
            continue
        own = seeds.child(metric)
        try:
            table = factorial_effects(scores, metric, seeds=own)
        except DataError as error:
            sentences.append(f"There are no effects of factors on {metric}. {error}")
            continue
        tables.append(table)
        sentences += self_test(scores, table, seeds=own.child("self-test"))
    return tuple(tables), sentences
