"""The table of factorial effects, and planted effects that the analysis has to recover."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flanmoe.core.errors import ConfigError
from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.factorial import factorial_effects
from flanmoe.study.analysis.observations import Observations
from flanmoe.study.analysis.pairing import pair
from flanmoe.study.analysis.planting import PlantedEffects, plant, recover
from flanmoe.study.analysis.spread import spread_of

Table = Callable[..., Observations]
Drawn = Callable[..., dict[str, Any]]
SEEDS = SeedTree(5)
ARMS: dict[str, dict[str, Any]] = {
    f"{size}-{'on' if general else 'off'}": {"size": size, "general": general}
    for size, general in itertools.product(("small", "large"), (False, True))
}


@pytest.fixture(scope="module")
def study(table: Table, drawn: Drawn) -> Observations:
    """General training adds 0.2, and 0.1 more where the model is large; size alone adds nothing."""
    effects = {arm: f["general"] * (0.2 + 0.1 * (f["size"] == "large")) for arm, f in ARMS.items()}
    return table(drawn(effects, luck=0.01), tasks=["t", "u"], arms=ARMS)


def test_effects_and_their_order(study: Observations) -> None:
    found = factorial_effects(study, "accuracy", seeds=SEEDS)
    assert [one.name for one in found.effects] == [
        "size large over small",
        "general on over off",
        "size large over small, and general on over off",
    ]
    size, general, both = found.effects
    for one, truth in ((size, 0.05), (general, 0.25), (both, 0.1)):
        assert one.low < truth < one.high
        assert sum(one.weights.values()) == pytest.approx(0)
    assert general.p_holm is not None
    assert general.p_holm < 0.01
    assert (found.num_arms, found.failed) == (4, ())


def test_relative_gains_are_over_cells_of_task_and_pair(study: Observations) -> None:
    general = factorial_effects(study, "accuracy", seeds=SEEDS).effects[1]
    paired = pair(study, "accuracy", tuple(ARMS))
    tasks = np.asarray([task for task, _ in paired.examples])
    cells = {
        (arm, task): paired.scores[a][:, tasks == task].mean()
        for a, arm in enumerate(paired.arms)
        for task in ("t", "u")
    }
    pairs = [
        (cells[f"{size}-on", task], cells[f"{size}-off", task])
        for size in ("small", "large")
        for task in ("t", "u")
    ]
    assert general.relative is not None
    assert general.relative.mean_of_ratios == pytest.approx(
        np.mean([(on - off) / off for on, off in pairs])
    )
    on, off = np.mean(pairs, axis=0)
    assert general.relative.ratio_of_means == pytest.approx((on - off) / off)
    assert general.relative.reasons == ()


def test_a_relative_gain_without_meaning_says_why(table: Table, drawn: Drawn) -> None:
    scores = drawn({arm: 0.3 * f["general"] for arm, f in ARMS.items()})
    data = table({arm: rows - 0.6 for arm, rows in scores.items()}, arms=ARMS)
    general = factorial_effects(data, "accuracy", seeds=SEEDS).effects[1]
    assert general.estimate == pytest.approx(0.3, abs=0.05)
    assert general.relative is not None
    assert general.relative.ratio_of_means is None
    assert "needs finite scores from 0 upwards" in general.relative.reasons[0]


def test_an_arm_that_failed_is_named(table: Table, drawn: Drawn) -> None:
    scores = drawn({arm: 0.2 * f["general"] for arm, f in ARMS.items() if arm != "large-on"})
    found = factorial_effects(table(scores, arms=ARMS), "accuracy", seeds=SEEDS)
    assert found.failed == ("large-on",)
    assert [one.factors for one in found.effects] == [("size",), ("general",)]
    assert set(found.effects[1].weights) == {"small-on", "small-off"}


def test_arms_without_factors_are_refused(table: Table) -> None:
    with pytest.raises(ConfigError, match="need arms that differ in one factor alone, but found 0"):
        factorial_effects(table({"a": [[1, 2]], "b": [[1, 2]]}), "accuracy", seeds=SEEDS)


def test_planted_effects_are_recovered(study: Observations) -> None:
    planted = PlantedEffects(factor="size", main=-0.3, other="general", interaction=0.4)
    size, general, both = recover(study, "accuracy", planted, seeds=SEEDS)
    # The effects that the study has itself are gone; those planted are there.
    assert size.planted == pytest.approx(-0.3 + 0.2)
    assert general.planted == pytest.approx(0.2)
    assert both.planted == pytest.approx(0.4)
    assert all(one.recovered for one in (size, general, both))
    assert all(one.found for one in (general, both))
    assert both.effect.estimate == pytest.approx(0.4, abs=0.1)


def test_an_effect_that_is_not_there_is_not_recovered(study: Observations) -> None:
    planted = PlantedEffects(factor="size", main=0.3, other="general", interaction=0.0)
    size, general, _ = recover(study, "accuracy", planted, seeds=SEEDS)
    assert general.planted == 0
    assert not general.found
    wrong = size.model_copy(update={"covered": False})
    missed = size.model_copy(update={"found": False})
    assert size.recovered
    assert not wrong.recovered
    assert not missed.recovered


def test_a_planted_copy_differs_by_what_was_planted_and_keeps_the_spread(
    study: Observations,
) -> None:
    weights = {"large-on": 1.0, "small-off": -1.0}
    original = pair(study, "accuracy", tuple(ARMS))
    expected = spread_of(original.parts(weights), original.strata)
    means = []
    for index in range(40):
        copy = plant(study, "accuracy", {"large-on": 2.0}, seeds=SEEDS.child("copy", index))
        found = pair(copy, "accuracy", tuple(ARMS))
        means.append(float(found.parts(weights).sum(axis=-1).mean()))
        assert found.scores.mean() == pytest.approx(original.scores.mean() + 0.5, abs=0.2)
    assert np.mean(means) == pytest.approx(2.0, abs=4 * float(expected.standard_error) / 40**0.5)
    assert np.std(means) == pytest.approx(float(expected.standard_error), rel=0.4)
