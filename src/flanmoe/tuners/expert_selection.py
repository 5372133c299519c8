"""Which experts a task uses: the two scores of ESFT, and the smallest sets that reach a share of them.

ESFT (expert-specialised fine-tuning, Wang et al. 2024, arXiv 2407.01906, section 3.3) scores each expert of
a layer on a sample of the task, normalises the scores over the experts of the layer, and trains the fewest
experts whose shares add up to a threshold p. The paper's thresholds are 0.1 for gates and 0.2 for tokens.

Scores here are means over tokens; the paper takes means over samples of means over their tokens, which is
the same for samples of one length. The released selection script normalises over layers instead of experts
and so keeps far too few of them (verified on its own score files); its published configurations agree
with what is written here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from flanmoe.core.config import Config
from flanmoe.core.errors import ModelError
from flanmoe.moe.routing_sums import RoutingSums

ExpertScore = Literal["gate", "token"]

# Thresholds of the paper.
USUAL_SHARES: Mapping[ExpertScore, float] = {"gate": 0.1, "token": 0.2}
# Sums of shares are compared with the threshold up to rounding.
_ROUNDING = 1e-9


class ExpertSelection(Config):
    """The experts of each sparse block that are trained.

    Attributes:
        experts: for each block, by its path in the model, the numbers of its chosen experts in
            ascending order.
    """

    experts: dict[str, tuple[int, ...]]

    @property
    def num_chosen(self) -> int:
        """Experts of all blocks together."""
        return sum(len(chosen) for chosen in self.experts.values())


def expert_shares(sums: RoutingSums, score: ExpertScore) -> Float[Tensor, " E"]:
    """Return each expert's score as a share of all experts' scores of its layer; they add up to 1.

    Args:
        sums: what the layer's router did with the tokens of the task; groups are taken together.
        score: `gate` is the mean gate over all tokens, 0 for those that went elsewhere (ESFT-Gate);
            `token` is the share of the tokens' choices that fell on the expert (ESFT-Token).

    Raises:
        ModelError: if no token was sent to any expert.
    """
    together = sums.together()
    scores = {"gate": together.gate_mass, "token": together.assignments}[score][0].double()
    total = scores.sum()
    if not total > 0:
        raise ModelError(
            f"Experts are chosen by what at least 1 token does, but {int(together.tokens)} tokens have a "
            f"`{score}` score of {float(total):g} together. Gather statistics on data of the task."
        )
    return scores / total


def smallest_set(shares: Float[Tensor, " E"], threshold: float) -> tuple[int, ...]:
    """Return the fewest experts whose shares add up to at least `threshold`, in ascending order.

    Of experts with equal shares the one of the lower number is taken first.
    """
    order = shares.sort(descending=True, stable=True)
    reached = order.values.cumsum(dim=0) >= threshold - _ROUNDING
    number = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(shares)
    return tuple(sorted(order.indices[:number].tolist()))


def largest_number(num_experts: int, threshold: float) -> int:
    """Return the most experts that `smallest_set` can hold: the largest n have at least n / E of the score."""
    return min(max(math.ceil(threshold * num_experts - _ROUNDING), 1), num_experts)


def select_experts(
    sums: Mapping[str, RoutingSums], *, score: ExpertScore, threshold: float
) -> ExpertSelection:
    """Choose for each block the fewest experts that reach a share of the score.

    Args:
        sums: for each block, by its path in the model, what its router did with the task's tokens.
        score: see `expert_shares`.
        threshold: share of the score that the chosen experts must reach, above 0 and at most 1.

    Raises:
        ModelError: if a layer sent no token to any expert.
    """
    return ExpertSelection(
        experts={
            name: smallest_set(expert_shares(layer, score), threshold)
            for name, layer in sums.items()
        }
    )


def ranks_of(
    selection: ExpertSelection, num_experts: Mapping[str, int], *, rank: int, elsewhere: int = 0
) -> dict[str, tuple[int, ...]]:
    """Return ranks for `LowRankConfig.rank` that give the chosen experts one rank and the others another.

    Args:
        selection: the chosen experts.
        num_experts: for each block the number of its experts.
        rank: of the chosen experts.
        elsewhere: of the others; 0 leaves them frozen.
    """
    return {
        name: _ranks(chosen, num_experts[name], rank, elsewhere)
        for name, chosen in selection.experts.items()
    }


def _ranks(chosen: Sequence[int], num_experts: int, rank: int, elsewhere: int) -> tuple[int, ...]:
    ranks = torch.full((num_experts,), elsewhere)
    ranks[list(chosen)] = rank
    return tuple(ranks.tolist())
