"""Simulated studies: do intervals cover the truth, is nothing taken for something, is a margin found?"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.analyse import analyse
from flanmoe.study.analysis.claims import Claim
from flanmoe.study.analysis.observations import Observation, Observations
from flanmoe.study.analysis.resampling import resample
from flanmoe.study.analysis.spread import spread_of
from flanmoe.study.analysis.strata import stratify

_NUM_STUDIES = 2000
# Shares of the variance that seeds, examples and their interaction have in one run.
_MIXTURES = {
    "seeds": (1.0, 0.01, 0.01),
    "seeds and some": (1.0, 0.05, 0.1),
    "examples": (0.05, 1.0, 0.05),
    "interaction": (0.0, 0.0, 1.0),
    "all": (1.0, 1.0, 1.0),
}


def _studies(mixture: tuple[float, ...], num_seeds: int, number: int, seed: int) -> Any:
    """Parts of contrasts whose truth is 0, over two tasks of 30 examples."""
    rng = np.random.default_rng(seed)
    _, strata = stratify([30, 30])
    seeds, examples, rest = (share**0.5 for share in mixture)
    values = (
        seeds * rng.normal(size=(number, num_seeds, 1))
        + 60**0.5 * examples * rng.normal(size=(number, 1, 60))
        + 60**0.5 * rest * rng.normal(size=(number, num_seeds, 60))
    )
    return values * strata.weights, strata


@pytest.mark.slow
@pytest.mark.parametrize("mixture", _MIXTURES)
# The floors are those that the docstring of contrast.py and docs/guide/claims.md state, less what chance
# may take from a share over 2000 studies.
@pytest.mark.parametrize(("num_seeds", "floor"), [(2, 0.87), (3, 0.91), (5, 0.935), (10, 0.94)])
def test_the_t_interval_covers_the_truth(mixture: str, num_seeds: int, floor: float) -> None:
    parts, strata = _studies(_MIXTURES[mixture], num_seeds, _NUM_STUDIES, 0)
    spread = spread_of(parts, strata)
    reach = stats.t.ppf(0.975, spread.degrees) * spread.standard_error
    covered = np.abs(spread.mean) <= reach
    assert covered.mean() >= floor


@pytest.mark.slow
def test_the_bootstrap_alone_is_too_narrow_at_three_seeds() -> None:
    parts, strata = _studies(_MIXTURES["seeds"], 3, 300, 1)
    draws = resample(parts, strata, seeds=SeedTree(0), num_resamples=400)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    assert ((low <= 0) & (high >= 0)).mean() < 0.85


def _verdicts(effects: tuple[float, ...], *, margin: float, number: int) -> Counter[str]:
    """Verdicts on one claim an effect in simulated studies of five seeds and sixty examples, right or wrong."""
    arms = {"base": 0.0, **{f"arm-{i}": effect for i, effect in enumerate(effects)}}
    claims = [
        Claim(
            name=f"claim-{i}",
            statement="Better.",
            metric="accuracy",
            better=(f"arm-{i}",),
            than=("base",),
            margin=margin,
        )
        for i in range(len(effects))
    ]
    found: Counter[str] = Counter()
    for study in range(number):
        rng = np.random.default_rng(study)
        hard = rng.normal(size=60)
        records = [
            Observation(arm, seed, "t", str(i), "accuracy", float(score))
            for arm, effect in arms.items()
            for seed in range(5)
            for i, score in enumerate(
                # Shares of right answers move by about a third of the shift of the normal numbers behind them.
                hard + 2.7 * effect + 0.1 * rng.normal() + 0.7 * rng.normal(size=60) > 0
            )
        ]
        results = analyse(
            Observations(records, arms={arm: {} for arm in arms}), claims, {}, seeds=SeedTree(study)
        )
        verdicts = {result.verdict for result in results}
        # Of several claims, one is enough to be wrong about the family.
        found["reproduced" if "reproduced" in verdicts else min(verdicts)] += 1
    return found


@pytest.mark.slow
def test_nothing_is_hardly_ever_reproduced() -> None:
    found = _verdicts((0.0, 0.0), margin=0.2, number=80)
    # Two-sided 5 % for the family leaves 2.5 % on the side that is claimed.
    assert found["reproduced"] <= stats.binom.ppf(0.999, 80, 0.025)
    assert found["contradicted"] > 40


@pytest.mark.slow
def test_the_margin_is_reproduced_where_the_power_says_so() -> None:
    found = _verdicts((0.2,), margin=0.2, number=60)
    decided = 60 - found["underpowered"]
    assert decided > 30
    assert found["reproduced"] >= stats.binom.ppf(0.001, decided, 0.8)
    assert found["contradicted"] <= stats.binom.ppf(0.999, decided, 0.025)
