"""Small tables of scores, written by a rule or drawn with known sizes of every source of chance."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from flanmoe.study.analysis.observations import Observation, Observations

Table = Callable[..., Observations]


@pytest.fixture(scope="session")
def table() -> Table:
    """Writes observations from arrays of [seeds, examples] by arm; examples are spread over tasks in turn."""

    def write(
        scores: Mapping[str, Any],
        *,
        metric: str = "accuracy",
        tasks: Sequence[str] = ("one",),
        arms: Mapping[str, Mapping[str, Any]] | None = None,
        failed: Sequence[str] = (),
    ) -> Observations:
        records = [
            Observation(arm, seed, tasks[i % len(tasks)], f"example-{i:04d}", metric, float(value))
            for arm, rows in scores.items()
            for seed, row in enumerate(np.atleast_2d(rows))
            for i, value in enumerate(row)
        ]
        declared = arms or {arm: {} for arm in (*scores, *failed)}
        return Observations(records, arms=declared)

    return write


@pytest.fixture(scope="session")
def drawn() -> Callable[..., dict[str, Any]]:
    """Draws scores by arm: an effect, the luck of each run, how hard an example is, and the rest."""

    def draw(
        effects: Mapping[str, float],
        *,
        num_seeds: int = 5,
        num_examples: int = 60,
        luck: float = 0.02,
        rest: float = 0.2,
        seed: int = 0,
    ) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        hard = rng.normal(0.5, 0.3, size=num_examples)
        return {
            arm: hard
            + effect
            + luck * rng.normal(size=(num_seeds, 1))
            + rest * rng.normal(size=(num_seeds, num_examples))
            for arm, effect in effects.items()
        }

    return draw
