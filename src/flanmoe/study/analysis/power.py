"""The smallest effect that a design would detect, and the scale at which it would detect a smaller one.

The minimum detectable effect (Bloom 1995, Evaluation Review 19) is the true effect that is found significant
in 80 % of studies of this design. With nu degrees of freedom and critical value t_c the test statistic follows
a noncentral t, so the effect is delta standard errors where P(T_nu(delta) > t_c) = 0.8. The usual sum of
quantiles, t_c + t_0.8, falls short of it by 5 % at two degrees of freedom and the 5 % level and by 13 % at the
1 % level, and is not used.
"""

import math
from collections.abc import Callable
from typing import cast

from scipy import stats
from scipy.optimize import brentq

from flanmoe.core.config import Config
from flanmoe.study.analysis.contrast import ContrastEstimate
from flanmoe.study.analysis.spread import degrees_of_sum

POWER = 0.8
_MOST_SEEDS = 1000
_LARGEST_FACTOR = 1024


class Scale(Config):
    """How large a study would have to be.

    Attributes:
        seeds: seeds of every arm.
        examples: evaluation examples in all, spread over the tasks as they are now.
    """

    seeds: int
    examples: int


def minimum_detectable_effect(
    standard_error: float, degrees: float, *, level: float, power: float = POWER
) -> float:
    """Return the effect that a two-sided t test at `level` finds with this power, in the error's unit."""
    critical = float(stats.t.ppf(1 - level / 2, degrees))
    # The noncentral t is asked for the side on which the effect lies; the other adds next to nothing.
    found = brentq(
        lambda shift: float(stats.nct.sf(critical, degrees, shift)) - power,
        0.0,
        10 + 4 * critical,
    )
    return cast("float", found) * standard_error


def detectable(estimate: ContrastEstimate, *, level: float, power: float = POWER) -> float | None:
    """Return the minimum detectable effect of the design behind an estimate.

    Returns None with one seed, where the luck of training has no measure, and where all differences are equal.
    """
    if estimate.num_seeds < 2 or estimate.is_constant:
        return None
    return minimum_detectable_effect(
        estimate.standard_error, estimate.degrees, level=level, power=power
    )


def sufficient_scales(
    estimate: ContrastEstimate, margin: float, *, level: float, power: float = POWER
) -> tuple[Scale, ...]:
    """Return scales at which the minimum detectable effect would be at most `margin`.

    The variances measured here are carried over: that of seeds falls with the number of seeds, that of
    examples with the number of examples, their interaction with both. First more seeds alone, then more
    examples alone, where that can do; where neither can (within 1000 seeds, 1024 times the examples), the
    fewest seeds with as few examples as these allow.
    """

    def suffices(seeds: int, factor: float) -> bool:
        return _detectable_at(estimate, (seeds, factor), level, power) <= margin

    alone = _fewest(lambda seeds: suffices(seeds, 1.0), 2, _MOST_SEEDS)
    factor = _fewest(lambda times: suffices(estimate.num_seeds, times), 1, _LARGEST_FACTOR)
    scales = [
        *([] if alone is None else [_scale(estimate, alone, 1)]),
        *([] if factor is None else [_scale(estimate, estimate.num_seeds, factor)]),
    ]
    if scales:
        return tuple(scales)
    fewest = _fewest(lambda seeds: suffices(seeds, _LARGEST_FACTOR), 2, _MOST_SEEDS)
    if fewest is None:
        return ()
    factor = _fewest(lambda times: suffices(fewest, times), 1, _LARGEST_FACTOR)
    return () if factor is None else (_scale(estimate, fewest, factor),)


def _scale(estimate: ContrastEstimate, seeds: int, factor: int) -> Scale:
    return Scale(seeds=seeds, examples=estimate.num_examples * factor)


def _detectable_at(
    estimate: ContrastEstimate, design: tuple[int, float], level: float, power: float
) -> float:
    """Minimum detectable effect with so many seeds and so many times the examples."""
    num_seeds, factor = design
    spread = estimate.spread
    interaction = float(spread.interaction) * estimate.num_seeds / (num_seeds * factor)
    own_seeds = max(float(spread.seeds - spread.interaction), 0.0)
    own_examples = max(float(spread.examples - spread.interaction), 0.0)
    seeds = own_seeds * estimate.num_seeds / num_seeds + interaction
    examples = own_examples / factor + interaction
    degrees = degrees_of_sum(
        (seeds, examples), (num_seeds - 1, float(spread.example_degrees) * factor)
    )
    error = math.sqrt(seeds + examples)
    return minimum_detectable_effect(error, float(degrees), level=level, power=power)


def _fewest(suffices: Callable[[int], bool], least: int, most: int) -> int | None:
    """Return the smallest number in the range that suffices, None where the largest does not."""
    if not suffices(most):
        return None
    low, high = least, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle + 1, high)
    return low
