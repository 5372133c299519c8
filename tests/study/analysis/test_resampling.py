"""The two-level bootstrap against a loop over resamples, against scipy's, and against its variance."""

import numpy as np
import pytest
from scipy import stats

from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.paired import bootstrap_interval
from flanmoe.study.analysis.resampling import resample
from flanmoe.study.analysis.strata import stratify


def _by_loops(values: np.ndarray, slices: tuple[slice, ...], number: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(number):
        rows = rng.choice(len(values), size=len(values))
        columns = np.concatenate(
            [
                rng.choice(np.arange(part.start, part.stop), size=part.stop - part.start)
                for part in slices
            ]
        )
        found.append(values[np.ix_(rows, columns)].sum(axis=1).mean())
    return np.asarray(found)


def test_same_distribution_as_drawing_by_loops() -> None:
    rng = np.random.default_rng(0)
    _, strata = stratify([5, 8])
    values = (rng.exponential(size=(3, 13)) + rng.normal(size=(3, 1))) * strata.weights
    fast = resample(values[None], strata, seeds=SeedTree(0), num_resamples=4000)[:, 0]
    slow = _by_loops(values, strata.slices, 4000)
    assert stats.ks_2samp(fast, slow).pvalue > 0.01


def test_one_seed_is_the_bootstrap_of_examples() -> None:
    rng = np.random.default_rng(2)
    samples = [rng.normal(size=30), rng.normal(size=50)]
    _, strata = stratify([30, 50])
    parts = np.concatenate(samples)[None, None] * strata.weights
    draws = resample(parts, strata, seeds=SeedTree(1), num_resamples=9999)[:, 0]
    expected = bootstrap_interval([list(map(float, one)) for one in samples], seeds=SeedTree(2))
    assert expected is not None
    np.testing.assert_allclose(np.quantile(draws, [0.025, 0.975]), expected, atol=0.02)


def test_all_seeds_answer_the_same_examples() -> None:
    """What is hard for every seed must not average out over seeds, as it would with examples drawn for each."""
    rng = np.random.default_rng(4)
    _, strata = stratify([50])
    hard = rng.normal(size=50)
    draws = resample(
        np.tile(hard, (10, 1))[None] * strata.weights, strata, seeds=SeedTree(0), num_resamples=4000
    )
    assert draws.std() == pytest.approx(hard.std() / 50**0.5, rel=0.05)


def test_statistics_share_their_draws_and_chunks_leave_no_gap() -> None:
    rng = np.random.default_rng(5)
    _, strata = stratify([400, 300])
    parts = rng.normal(size=(1, 2, 700)) * strata.weights
    both = np.concatenate([parts, -2 * parts])
    draws = resample(both, strata, seeds=SeedTree(0), num_resamples=1500)
    np.testing.assert_allclose(draws[:, 1], -2 * draws[:, 0])
    assert (draws[:, 0] != 0).all()
    assert len(np.unique(draws[:, 0])) == 1500
    np.testing.assert_array_equal(
        draws, resample(both, strata, seeds=SeedTree(0), num_resamples=1500)
    )
