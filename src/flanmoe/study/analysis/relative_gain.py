"""Two readings of "a gain of 31 %", as pure functions.

Studies of transfer report relative gains over several tasks and models (Albalak et al. 2022, arXiv 2210.03871)
without saying which mean they take. The two differ: a mean of ratios is led by the cells with the smallest
baseline.

A ratio means something only on a scale with a true zero. Both functions therefore refuse scores below zero (of
a chance-normalised score zero is guessing, not nothing) and baselines near zero, where ratios explode.
"""

import numpy as np
from jaxtyping import Float

from flanmoe.core.errors import DataError

Cells = Float[np.ndarray, " C"]


def ratio_of_means(with_it: Cells, without: Cells, *, least_baseline: float) -> float:
    """Return (mean with - mean without) / mean without, over matched cells.

    Args:
        with_it, without: scores of the same cells (a task and two arms that differ in one thing).
        least_baseline: the mean without must be at least this.

    Raises:
        DataError: if the cells do not match, a score is below zero or not finite, or the baseline is too small.
    """
    _require_cells(with_it, without)
    baseline = float(without.mean())
    _require_baseline(baseline, least_baseline)
    return float(with_it.mean()) / baseline - 1


def mean_of_ratios(with_it: Cells, without: Cells, *, least_baseline: float) -> float:
    """Return the mean over matched cells of (with - without) / without.

    Args:
        with_it, without: scores of the same cells.
        least_baseline: every single score without must be at least this.

    Raises:
        DataError: if the cells do not match, a score is below zero or not finite, or a baseline is too small.
    """
    _require_cells(with_it, without)
    _require_baseline(float(without.min()), least_baseline)
    return float((with_it / without).mean()) - 1


def _require_cells(with_it: Cells, without: Cells) -> None:
    if with_it.shape != without.shape or with_it.size == 0:
        raise DataError(
            f"A relative gain needs matched cells, at least 1, but found {with_it.size} with and "
            f"{without.size} without. Compare the same tasks on both sides."
        )
    values = np.concatenate([with_it, without])
    if not (np.isfinite(values).all() and (values >= 0).all()):
        worst = float(values[~(values >= 0) | ~np.isfinite(values)][0])
        raise DataError(
            f"A relative gain needs finite scores from 0 upwards, but found {worst:g}. Take the difference in "
            "points instead."
        )


def _require_baseline(baseline: float, least: float) -> None:
    if not least > 0:
        raise ValueError(f"`least_baseline` must be above 0, but is {least:g}.")
    if baseline < least:
        raise DataError(
            f"A relative gain needs a baseline of at least {least:g}, but found {baseline:g}. Take the "
            "difference in points instead."
        )
