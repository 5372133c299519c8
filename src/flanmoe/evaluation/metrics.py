"""Means with their standard errors, and scores measured from the chance level."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

from flanmoe.core.config import Config
from flanmoe.core.errors import DataError


class Estimate(Config):
    """A mean and how far it may be off.

    Attributes:
        mean: the mean.
        standard_error: its standard error, the values taken as independent; None where it cannot be
            known from the sample (a single value).
        clustered_standard_error: the same where the values of one task may move together; None
            where no clusters were given, or only one.
        num_values: how many values the mean is over: examples, or tasks for an average over tasks.
    """

    mean: float
    standard_error: float | None
    clustered_standard_error: float | None = None
    num_values: int


def estimate_mean(
    values: Sequence[float], *, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """Return the mean of `values` with its standard error, s / sqrt(n) with n - 1 in s.

    Args:
        values: one per example.
        clusters: for each value the name of the group whose members may move together.

    Raises:
        DataError: if there is no value.
    """
    if len(values) == 0:
        raise DataError(
            "A mean needs at least one value, but found 0. Evaluate some examples first."
        )
    array = np.asarray(values, dtype=np.float64)
    num_values = len(array)
    error = float(array.std(ddof=1) / math.sqrt(num_values)) if num_values > 1 else None
    return Estimate(
        mean=float(array.mean()),
        standard_error=error,
        clustered_standard_error=None if clusters is None else _clustered_error(array, clusters),
        num_values=num_values,
    )


def _clustered_error(values: np.ndarray, clusters: Sequence[Hashable]) -> float | None:
    """Cluster-robust standard error of a mean (Liang & Zeger 1986; for evaluations arXiv 2411.00640).

    The factor G / (G - 1) for G clusters makes it the usual error where every value is its
    own cluster.
    """
    if len(clusters) != len(values):
        raise ValueError(
            f"`clusters` must name one cluster per value ({len(values)}), but has {len(clusters)}."
        )
    sums: dict[Hashable, float] = {}
    for cluster, deviation in zip(clusters, values - values.mean(), strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + float(deviation)
    if len(sums) < 2:
        return None
    spread = sum(value * value for value in sums.values()) * len(sums) / (len(sums) - 1)
    return math.sqrt(spread) / len(values)


def macro_average(estimates: Sequence[Estimate]) -> Estimate:
    """Return the unweighted mean over tasks: every task counts the same, however many examples it has.

    The tasks are taken as given, so `standard_error` holds the sampling error of the examples
    alone, sqrt(sum of squared errors) / k. `clustered_standard_error` is the spread of the k task
    means, for those who take the tasks as a sample of tasks.

    Raises:
        DataError: if there is no task.
    """
    across_tasks = estimate_mean([estimate.mean for estimate in estimates])
    errors = [estimate.standard_error for estimate in estimates]
    known = [error for error in errors if error is not None]
    within = math.sqrt(sum(error * error for error in known)) / len(errors)
    return Estimate(
        mean=across_tasks.mean,
        standard_error=within if len(known) == len(errors) else None,
        clustered_standard_error=across_tasks.standard_error,
        num_values=len(estimates),
    )


def with_pooled_errors(estimates: Sequence[Estimate]) -> list[Estimate]:
    """Give tasks of a single example the standard error that the spread within the other tasks suggests.

    A small sample spread over many tasks leaves some with one example, whose spread cannot be seen. They are
    taken to vary as examples do within the other tasks: s^2 = sum of (n - 1) s_i^2 / sum of (n - 1), as the
    spread within groups is pooled in an analysis of variance. Where no task has two examples, nothing changes.
    """
    degrees = sum(estimate.num_values - 1 for estimate in estimates)
    if not degrees:
        return list(estimates)
    # s_i^2 = n times the squared standard error.
    spread = sum(
        (estimate.num_values - 1) * estimate.num_values * estimate.standard_error**2
        for estimate in estimates
        if estimate.standard_error is not None
    )
    error = math.sqrt(spread / degrees)
    return [
        estimate.model_copy(update={"standard_error": error})
        if estimate.num_values == 1
        else estimate
        for estimate in estimates
    ]


def chance_normalised(score: float, chance: float) -> float:
    """Return 100 (score - chance) / (100 - chance): 0 is guessing, 100 is perfect, below 0 is worse.

    Both are in percent. This is the normalisation behind the averages of Chung et al.
    (arXiv 2210.11416) and FLAN-MoE (arXiv 2305.14705): each task's score first, then the average
    over tasks.

    Raises:
        DataError: if `chance` is 100 or more, where no score can be better than guessing.
    """
    if not chance < 100:
        raise DataError(
            f"The chance level must be below 100 percent, but is {chance:g}. "
            "Leave questions with a single choice out."
        )
    return 100 * (score - chance) / (100 - chance)


def normalised_average(scores: Sequence[float], chances: Sequence[float]) -> float:
    """Return the mean of chance-normalised scores, all in percent (Chung et al., arXiv 2210.11416, table 5).

    Raises:
        DataError: if there is no score.
        ValueError: if scores and chances differ in number.
    """
    pairs = zip(scores, chances, strict=True)
    return estimate_mean([chance_normalised(score, chance) for score, chance in pairs]).mean
