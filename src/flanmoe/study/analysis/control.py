"""Controls: an effect of known size is planted into copies of a claim's data and has to be found, and copies
without one must show none.

They answer for the analysis as it ran on this study's own data, with its seeds, examples and spread, where a
formula only answers for its assumptions.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats

from flanmoe.core.config import Config
from flanmoe.core.seeds import SeedTree
from flanmoe.study.analysis.spread import spread_of
from flanmoe.study.analysis.strata import Strata
from flanmoe.study.analysis.wild import null_copies

NUM_COPIES = 200
_LARGEST_CHUNK = 2**21
# What is planted has a power of 80 %, and nothing has one of 5 %, by formulas that are rough at few seeds.
_LEAST_FOUND = 0.5
_MOST_FALSE = 0.12


class Control(Config):
    """What the analysis found in copies of a claim's data.

    Attributes:
        planted: the effect planted, in the metric's own unit: the claim's margin, or the minimum detectable
            effect where that is larger.
        found_share: share of the copies with it in which it was found significant, with its sign.
        false_share: share of the copies without any in which one was found.
        level: two-sided level of the tests.
        num_copies: copies of each kind.
    """

    planted: float
    found_share: float
    false_share: float
    level: float
    num_copies: int

    @property
    def passed(self) -> bool:
        """Whether the planted effect was found in most copies, and hardly anything in those without one."""
        return self.found_share >= _LEAST_FOUND and self.false_share <= _MOST_FALSE


def run_control(
    parts: Float[np.ndarray, "S N"],
    strata: Strata,
    planted: float,
    *,
    level: float,
    seeds: SeedTree,
    num_copies: int = NUM_COPIES,
) -> Control:
    """Plant an effect into copies of what the examples add to a contrast, and analyse them.

    The copies are judged by the t test of `contrast.py`; drawing anew 10,000 times from each of 400 copies
    would take minutes, and where seeds are few the t test is the stricter of the two.
    """
    draws = seeds.numpy()
    chunk = max(1, _LARGEST_CHUNK // parts.size)
    found = false = 0
    for start in range(0, num_copies, chunk):
        size = min(chunk, num_copies - start)
        copies = null_copies(parts, strata, num_copies=size, draws=draws)
        false += int(_significant(copies, strata, level=level).astype(bool).sum())
        with_effect = copies + planted * strata.weights / strata.weights.sum()
        found += int((_significant(with_effect, strata, level=level) == np.sign(planted)).sum())
    return Control(
        planted=planted,
        found_share=found / num_copies,
        false_share=false / num_copies,
        level=level,
        num_copies=num_copies,
    )


def _significant(
    copies: Float[np.ndarray, "C S N"], strata: Strata, *, level: float
) -> Float[np.ndarray, " C"]:
    """Sign of each copy's estimate where it is significant, 0 where it is not."""
    spread = spread_of(copies, strata)
    reach = stats.t.ppf(1 - level / 2, spread.degrees) * spread.standard_error
    return np.where(np.abs(spread.mean) > reach, np.sign(spread.mean), 0.0)
