"""The self-test of a factorial study: it passes on scores that hang together and says so when it does not."""

import random

import pytest

from flanmoe.core.seeds import SeedTree
from flanmoe.study import self_test as module
from flanmoe.study.analysis.factorial import factorial_effects
from flanmoe.study.analysis.observations import Observation, Observations
from flanmoe.study.self_test import self_test


def observations(num_seeds: int, factors: tuple[str, ...] = ("size", "general")) -> Observations:
    """Scores of a two-level grid with a real effect and noise of seeds and examples."""
    draw = random.Random(1)
    cells = [{}]
    for name in factors:
        cells = [{**cell, name: level} for cell in cells for level in (False, True)]
    arms = {f"arm{place}": cell for place, cell in enumerate(cells)}
    hard = [draw.gauss(0, 0.5) for _ in range(60)]
    rows = [
        Observation(arm, seed, "t", str(place), "loss", 2 + sum(cell.values()) + hard[place] + luck)
        for arm, cell in arms.items()
        for seed in range(num_seeds)
        for luck in [draw.gauss(0, 0.05)]
        for place in range(60)
    ]
    noisy = [
        Observation(
            row.arm, row.seed, row.task, row.example, row.metric, row.value + draw.gauss(0, 0.1)
        )
        for row in rows
    ]
    return Observations(noisy, arms=arms)


def sentences_of(found: Observations) -> tuple[str, ...]:
    table = factorial_effects(found, "loss", seeds=SeedTree(0))
    return self_test(found, table, seeds=SeedTree(1))


def test_planted_effects_are_recovered() -> None:
    (sentence,) = sentences_of(observations(3))
    assert sentence.startswith("The self-test of the effects on loss passes: an effect of size of ")
    assert "3 of 3 effects came out as planted" in sentence


def test_an_analysis_that_finds_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = observations(3)
    recover = module.recover
    monkeypatch.setattr(
        module,
        "recover",
        lambda *arguments, **named: [
            one.model_copy(update={"covered": False}) for one in recover(*arguments, **named)
        ],
    )
    (sentence,) = sentences_of(found)
    assert "fails" in sentence
    assert "0 of 3 effects" in sentence


def test_one_factor_or_one_seed_cannot_be_tested() -> None:
    assert sentences_of(observations(3, ("size",))) == ()
    assert sentences_of(observations(1)) == ()
