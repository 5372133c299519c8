"""Paired differences: example by example, then over examples or tasks, with bootstrap intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from flanmoe.core.config import Config
from flanmoe.core.seeds import SeedTree
from flanmoe.evaluation.metrics import Estimate, estimate_mean, with_pooled_errors
from flanmoe.evaluation.results import ExampleRecord

CONFIDENCE_LEVEL = 0.95
NUM_RESAMPLES = 9999

Pair = tuple[ExampleRecord, ExampleRecord]
Differences = Callable[[Sequence[Pair]], list[tuple[float, str]]]


class PairedDifference(Config):
    """The mean of second minus first, over examples or over tasks.

    Attributes:
        difference: the mean with its standard errors.
        interval: bootstrap interval at 95 %; None where a task has only one example to draw from.
    """

    difference: Estimate
    interval: tuple[float, float] | None


def bootstrap_interval(
    samples: Sequence[Sequence[float]], *, seeds: SeedTree
) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean of the samples' means.

    Each sample (a task) is drawn anew by itself. One sample gives the interval of its mean. The
    percentile form is used because differences of right and wrong answers take three values only,
    where the corrections of the other forms divide by zero.

    Returns None where a sample has fewer than two values: nothing can be drawn anew from one.
    """
    if min(len(sample) for sample in samples) < 2:
        return None
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if all(np.ptp(array) == 0 for array in arrays):
        middle = float(np.mean([array[0] for array in arrays]))
        return middle, middle
    found = bootstrap(
        arrays,
        _mean_of_means,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=512,
        confidence_level=CONFIDENCE_LEVEL,
        method="percentile",
        rng=seeds.numpy(),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _mean_of_means(*samples: np.ndarray, axis: int) -> Any:
    return sum(sample.mean(axis=axis) for sample in samples) / len(samples)


def loss_differences(pairs: Sequence[Pair]) -> list[tuple[float, str]]:
    """Differences of loss with their tasks; none at all where the models cut an answer into other tokens."""
    if any(one.num_tokens != other.num_tokens for one, other in pairs):
        return []
    return [
        (other.loss - one.loss, one.task)
        for one, other in pairs
        if one.loss is not None and other.loss is not None
    ]


def score_differences(pairs: Sequence[Pair]) -> list[tuple[float, str]]:
    """Differences of score with their tasks, of examples that both results score."""
    return [
        (other.score - one.score, one.task)
        for one, other in pairs
        if one.score is not None and other.score is not None
    ]


def weighted_difference(
    by_task: Mapping[str, Sequence[Pair]], weights: Mapping[str, float], *, seeds: SeedTree
) -> PairedDifference:
    """Return the weighted sum over tasks of the mean difference in score, second minus first.

    For the interval, examples are drawn anew within each task. Tasks with a single example are drawn anew
    together (collapsed strata, Cochran 1977, section 5A.12), which errs on the side of a wider interval.
    """
    samples = {
        task: found
        for task, pairs in by_task.items()
        if (found := [value for value, _ in score_differences(pairs)])
    }
    estimates = with_pooled_errors([estimate_mean(sample) for sample in samples.values()])
    factors = [weights[task] for task in samples]
    errors = [
        factor * estimate.standard_error
        for factor, estimate in zip(factors, estimates, strict=True)
        if estimate.standard_error is not None
    ]
    strata = _strata(
        [[weights[task] * value / len(own) for value in own] for task, own in samples.items()]
    )
    return PairedDifference(
        difference=Estimate(
            mean=sum(one.mean * factor for one, factor in zip(estimates, factors, strict=True)),
            standard_error=math.hypot(*errors) if len(errors) == len(estimates) else None,
            num_values=len(estimates),
        ),
        # The sum over strata of the sums of their values, as a mean of means.
        interval=bootstrap_interval(
            [[len(strata) * len(stratum) * value for value in stratum] for stratum in strata],
            seeds=seeds,
        ),
    )


def _strata(samples: Sequence[Sequence[float]]) -> list[list[float]]:
    """Put samples of one value together, so that there is something to draw anew from."""
    strata = [list(sample) for sample in samples if len(sample) > 1]
    single = [value for sample in samples if len(sample) == 1 for value in sample]
    if len(single) == 1 and strata:
        min(strata, key=len).extend(single)
    elif single:
        strata.append(single)
    return strata
