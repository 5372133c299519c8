"""Capacity: how many assignments an expert takes from one group of tokens, and who gets them.

The same factor means different budgets in different code bases, so everything that it depends on is
an option here, and the number of choices k is no part of it (research: Flaxformer, Mesh-TF,
st-moe-pytorch agree on that; the GShard paper's 2N/(G E) is factor 2).
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator
from torch import Tensor

from flanmoe.core.config import Config
from flanmoe.moe.routing import numbered, places

Rounding = Literal["nearest", "down", "up"]

_ROUNDED: Mapping[Rounding, Callable[[Fraction], int]] = {
    "nearest": round,
    "down": math.floor,
    "up": math.ceil,
}


class CapacityConfig(Config):
    """How many assignments an expert takes from one group.

    C = max(minimum, round(factor * real tokens of the group / num_experts)).

    Attributes:
        train: factor in training mode; None for no limit.
        evaluation: factor in evaluation mode; None, the default, for no limit: a limit makes the
            output of a token depend on the other tokens of its group.
        rounding: `nearest` rounds halves to even (Flaxformer, T5X), `down` is Mesh-TF's and
            st-moe-pytorch's, `up` never drops a token of an even load.
        minimum: least capacity.
        group: whose tokens compete: those of one example (`segment`), or all of a forward pass
            (`batch`).
        group_size: `batch` only: cut the batch into the fewest equal runs of at most this many
            tokens; None leaves it whole. (Flaxformer lowers the number of runs until it divides
            the batch, so its groups may be larger than asked for.)
    """

    train: float | None = Field(default=1.25, gt=0, allow_inf_nan=False)
    evaluation: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    rounding: Rounding = "nearest"
    minimum: int = Field(default=4, ge=1)
    group: Literal["segment", "batch"] = "batch"
    group_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _group_size_has_an_effect(self) -> "CapacityConfig":
        if self.group == "segment" and self.group_size is not None:
            raise ValueError(
                f"`group_size` only has an effect with `group: batch`, but is {self.group_size} "
                "with `group: segment`; leave it out"
            )
        return self

    def factor(self, *, training: bool) -> float | None:
        """Return the factor of a mode, None for no limit."""
        return self.train if training else self.evaluation

    def groups(self, segments: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
        """Return the number of each token's group, from 0 without gaps."""
        if self.group == "segment":
            return numbered(segments)
        num_tokens = len(segments)
        num_groups = -(-num_tokens // self.group_size) if self.group_size else 1
        positions = torch.arange(num_tokens, device=segments.device)
        return positions * num_groups // max(num_tokens, 1)

    def capacities(
        self, num_tokens: Int[Tensor, " G"], num_experts: int, *, factor: float
    ) -> Int[Tensor, " G"]:
        """Return the capacity of an expert in each group of so many real tokens."""
        share = rounded_share(num_tokens, num_experts, factor=factor, rounding=self.rounding)
        return share.clamp(min=self.minimum)


def rounded_share(
    num_tokens: Int[Tensor, " G"], num_experts: int, *, factor: float, rounding: Rounding
) -> Int[Tensor, " G"]:
    """Return factor * num_tokens / num_experts, rounded, in exact arithmetic.

    The factor is taken as the decimal number that it is written as: 1.1 * 10 rounds up to 11.
    """
    exact = Fraction(str(factor)) / num_experts
    # In Python's integers: a factor with many digits, 4 / 3 for one, would overflow those of torch.
    return num_tokens.new_tensor(
        [_ROUNDED[rounding](exact * number) for number in _ints(num_tokens)]
    )


def _ints(values: Int[Tensor, " G"]) -> list[int]:
    numbers: list[int] = values.tolist()  # pyright: ignore
    return numbers


def fitting(
    expert_ids: Int[Tensor, "T k"],
    asked: Bool[Tensor, "T k"],
    *,
    groups: Int[Tensor, " T"],
    capacities: Int[Tensor, " G"],
    order: Int[Tensor, " T"],
    num_experts: int,
) -> Bool[Tensor, "T k"]:
    """Say which choices get a place.

    All first choices are placed before any second choice, each in the order of the tokens. A choice
    that was given up takes no place. One that does not fit still counts for those after it, which
    changes nothing: they do not fit either.

    Args:
        expert_ids, asked: the choices of each token, best first.
        groups: the group of each token.
        capacities: places that an expert has for each group.
        order: token ids, first served first.
        num_experts: number of experts.
    """
    num_cells = len(capacities) * num_experts
    cells = torch.where(asked, groups.unsqueeze(1) * num_experts + expert_ids, num_cells)
    by_priority = cells[order].T.reshape(-1)
    limits = torch.cat([capacities.repeat_interleave(num_experts), capacities.new_zeros(1)])
    fits = places(by_priority) < limits[by_priority]
    kept = torch.empty_like(asked)
    kept[order] = fits.reshape(expert_ids.shape[1], len(order)).T
    return kept
