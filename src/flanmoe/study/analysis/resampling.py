"""The two-level bootstrap: seeds are drawn anew, and examples within tasks, in every resample.

All seeds of a study answer the same examples: the two are crossed, not nested. So one draw of examples
serves all seeds of a resample (the pigeonhole bootstrap, Owen 2007, Annals of Applied Statistics 1, arXiv
0712.1111). Drawing examples for each seed by itself would take an example that is hard for every seed as
several independent ones and make intervals too narrow.

Intervals are read off as percentiles. BCa was left out on purpose: it needs an acceleration, estimated by
leaving out one unit at a time, and with two kinds of units of which one numbers three this is noise, while
differences of right and wrong answers make its bias correction divide by zero. What the percentile lacks
at few seeds (three seeds drawn anew spread too little by a factor of 3/2 in variance) the t interval
beside it has (`contrast.py`).
"""

import numpy as np
from jaxtyping import Float

from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.strata import Strata

NUM_RESAMPLES = 9999
# Counts of one chunk stay in the cache.
_LARGEST_CHUNK = 2**18


def resample(
    parts: Float[np.ndarray, "K S N"],
    strata: Strata,
    *,
    seeds: SeedTree,
    num_resamples: int = NUM_RESAMPLES,
) -> Float[np.ndarray, "R K"]:
    """Draw K statistics anew, all with the same draws.

    Args:
        parts: what each example with each seed adds to a statistic, which is the sum over examples of the mean
            over seeds.
        strata: examples are drawn within these.
        seeds: where the draws come from.
        num_resamples: R.
    """
    draws = seeds.numpy()
    num_statistics, num_seeds, _ = parts.shape
    chunk = max(1, min(num_resamples, _LARGEST_CHUNK // int(strata.sizes.max())))
    found = np.empty((num_resamples, num_statistics))
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        totals = np.zeros((size, num_statistics * num_seeds))
        for part in strata.slices:
            values = parts[:, :, part].reshape(num_statistics * num_seeds, -1)
            totals += _counts(draws, size, values.shape[1]) @ values.T
        seed_counts = _counts(draws, size, num_seeds) / num_seeds
        by_seed = totals.reshape(size, num_statistics, num_seeds)
        found[start : start + size] = np.einsum("rks,rs->rk", by_seed, seed_counts)
    return found


def _counts(draws: np.random.Generator, size: int, number: int) -> Float[np.ndarray, "R n"]:
    """How often each of `number` things is drawn in `number` draws, `size` times over."""
    drawn = draws.integers(number, size=(size, number))
    drawn += np.arange(0, size * number, number)[:, None]
    counted = np.bincount(drawn.ravel(), minlength=size * number)
    return counted.reshape(size, number).astype(np.float64)
