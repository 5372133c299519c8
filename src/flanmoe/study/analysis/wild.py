"""Copies of data in which nothing differs, with the spread of the data themselves.

The labels of what is compared are exchanged at random, example by example: in a contrast that turns the sign
of a difference. Signs are turned for examples, and for what an example does with one seed alone, each by itself
(a wild bootstrap, Liu 1988, Annals of Statistics 16), after means have been taken out. The luck of training is
drawn anew as normal numbers with the variance that it was measured to have, since three seeds have only four
patterns of signs. Exchanging labels alone would average that luck away, and every copy would look far more
certain than the study is.
"""

import numpy as np
from jaxtyping import Float

from flanmoe.study.analysis.spread import spread_of
from flanmoe.study.analysis.strata import Strata


def null_copies(
    parts: Float[np.ndarray, "*any S N"],
    strata: Strata,
    *,
    num_copies: int,
    draws: np.random.Generator,
) -> Float[np.ndarray, "C *any S N"]:
    """Return copies of `parts` (see `Paired.parts`) whose sum over examples is zero in expectation.

    Draws are shared over the leading axes: arms that went up together with a seed still do. What taking means
    out took from the spread is put back by the factors n / (n - 1), and what the interaction adds to the spread
    of seeds and of examples is taken from theirs, as it is in the copies by itself.
    """
    num_seeds, number = parts.shape[-2:]
    of_example = strata.of_example
    widen_seeds = np.sqrt(num_seeds / max(num_seeds - 1, 1))
    widen_examples = np.sqrt(strata.sizes / np.maximum(strata.sizes - 1, 1))[of_example]
    by_seed = strata.means(parts)
    middle = by_seed.mean(axis=-2, keepdims=True)
    seed_part = by_seed - middle
    example_part = parts.mean(axis=-2, keepdims=True) - middle[..., of_example]
    rest = parts - by_seed[..., of_example] - example_part
    of_seeds, of_examples = _own_shares(parts, strata)
    leading = (1,) * (parts.ndim - 2)

    def signs(*shape: int) -> Float[np.ndarray, "..."]:
        drawn = draws.integers(2, size=(num_copies, *shape), dtype=np.int8) * 2.0 - 1.0
        return drawn.reshape(num_copies, *leading, *shape)

    mixing = draws.standard_normal((num_copies, *leading, num_seeds, num_seeds))
    # Each row is a normal number of the variance that the seeds have, the same for all strata and arms.
    luck = mixing @ (seed_part * of_seeds) / np.sqrt(max(num_seeds - 1, 1))
    copies = signs(num_seeds, number) * (rest * (widen_seeds * widen_examples))
    copies += signs(1, number) * (example_part * (widen_examples * of_examples))
    return copies + luck[..., of_example]


def _own_shares(
    parts: Float[np.ndarray, "*any S N"], strata: Strata
) -> tuple[Float[np.ndarray, "*any 1 1"], Float[np.ndarray, "*any 1 1"]]:
    """Roots of the shares of the variances of seeds and of examples that are not their interaction."""
    spread = spread_of(parts, strata)
    shares = [
        np.sqrt(np.maximum(1 - spread.interaction / np.where(whole > 0, whole, np.inf), 0))
        for whole in (spread.seeds, spread.examples)
    ]
    return shares[0][..., None, None], shares[1][..., None, None]
