"""How PEFT lays out the low-rank change of a fused expert parameter, and ours from it and back.

PEFT 0.21 keeps one matrix A of shape (E * r, inputs), expert after expert, and one matrix B of shape (outputs,
r * E) in which the experts of the first rank come first: column `rank * E + expert`. All experts have one rank
and one scale. Ours may differ from expert to expert, so smaller ranks are filled up with zeros, and where
scales differ B takes them over. An A that all experts share is written once for each.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flanmoe.moe.compute.low_rank import LowRankFactors


@dataclass(frozen=True, slots=True)
class PeftScale:
    """The one rank and scale of everything that PEFT reads as a parameter.

    Attributes:
        rank: of every expert, zeros included.
        alpha: scales by alpha / rank, or alpha / sqrt(rank).
        rank_stabilised: which of the two.
    """

    rank: int
    alpha: float
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """What a change is multiplied by."""
        return self.alpha / self.rank ** (0.5 if self.rank_stabilised else 1.0)


def common_scale(factors: Collection[LowRankFactors], ranks: Collection[int] = ()) -> PeftScale:
    """Return the rank and scale that some changes are saved with together.

    Where all experts have one rank and one scale it is theirs, and their numbers are saved as they are.
    Otherwise it is the largest rank and a scale of 1.

    Args:
        factors: the changes of experts.
        ranks: those of changes beside them.
    """
    found = {
        PeftScale(rank, one.alpha, one.rank_stabilised)
        for one in factors
        for rank in one.ranks
        if rank
    }
    if len(found) == 1 and not ranks:
        return found.pop()
    largest = max([*(scale.rank for scale in found), *ranks])
    return PeftScale(largest, float(largest))


def to_peft(
    factors: LowRankFactors, saved: PeftScale
) -> tuple[Float[Tensor, "_ n"], Float[Tensor, "m _"]]:
    """Return A and B as PEFT lays them out, with the rank and scale that they are saved with."""
    experts = factors.num_experts
    a = factors.a.new_zeros(experts, saved.rank, factors.a.shape[1])
    b = factors.b.new_zeros(factors.b.shape[1], saved.rank, experts)
    for expert in range(experts):
        own = factors.of_expert(expert)
        a[expert, : len(own.a)] = own.a.detach()
        b[:, : len(own.b), expert] = _rescaled(own.b.detach().T, own.scale, saved.scale)
    return a.flatten(0, 1), b.flatten(1)


def padded(
    a: Float[Tensor, "r n"], b: Float[Tensor, "m r"], scale: float, saved: PeftScale
) -> tuple[Float[Tensor, "s n"], Float[Tensor, "m s"]]:
    """Return A and B of a plain matrix, filled up with zeros to the rank that they are saved with."""
    more = saved.rank - len(a)
    return (
        torch.cat([a, a.new_zeros(more, a.shape[1])]),
        torch.cat([_rescaled(b, scale, saved.scale), b.new_zeros(len(b), more)], dim=1),
    )


@torch.no_grad()
def fill(factors: LowRankFactors, a: Float[Tensor, "_ n"], b: Float[Tensor, "m _"]) -> None:
    """Copy matrices that PEFT laid out into changes of the same ranks and scale."""
    experts = factors.num_experts
    rows = b.reshape(len(b), -1, experts).permute(2, 1, 0).flatten(0, 1)
    factors.a.copy_(a)
    factors.b.copy_(rows)


def _rescaled(b: Tensor, scale: float, saved: float) -> Tensor:
    return b if scale == saved else b * (scale / saved)
