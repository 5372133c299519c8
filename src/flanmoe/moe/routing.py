"""`Routing`: what a router decided for one batch, as an assignment list.

Token choice, capacity drops and expert choice are the same thing here: a list of (token, expert,
gate) triples. A token that was dropped, or that no expert chose, is simply absent (DESIGN 5.5).
Beside the list stand the `Choices`: what tokens asked for before capacity said no. Balance losses
count those, and a replay needs them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flanmoe.core.errors import ModelError


@dataclass(frozen=True, slots=True)
class Choices:
    """What tokens asked for, best choice first. T tokens, k choices a token.

    Where experts choose and tokens do not ask, k is 0.

    Attributes:
        expert_ids: the experts of each token in the order of its choices, all different.
        asked: False where a choice was given up before capacity was looked at: padding, and second
            choices that a policy turned down.
    """

    expert_ids: Int[Tensor, "T k"]
    asked: Bool[Tensor, "T k"]

    @classmethod
    def none(cls, num_tokens: int, device: torch.device) -> "Choices":
        """Return the choices of tokens that ask for nothing."""
        shape = (num_tokens, 0)
        return cls(
            expert_ids=torch.zeros(shape, dtype=torch.long, device=device),
            asked=torch.zeros(shape, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True, slots=True)
class ForcedRouting:
    """Experts to use whatever the scores say; gates are still computed from the scores.

    Replaying a recorded routing this way keeps a recomputed forward pass from sending near ties
    elsewhere, and lets one engine follow what another decided.

    Attributes:
        token_ids, expert_ids: the assignments to make.
        choices: what the tokens asked for, from which renormalised gates are computed.
    """

    token_ids: Int[Tensor, " N"]
    expert_ids: Int[Tensor, " N"]
    choices: Choices

    @classmethod
    def of_experts(cls, expert_ids: Int[Tensor, "T k"]) -> "ForcedRouting":
        """Force these experts for every token, best choice first, nothing dropped."""
        num_tokens, top_k = expert_ids.shape
        token_ids = torch.arange(num_tokens, device=expert_ids.device)
        return cls(
            token_ids=token_ids.repeat_interleave(top_k),
            expert_ids=expert_ids.reshape(-1),
            choices=Choices(expert_ids, torch.ones_like(expert_ids, dtype=torch.bool)),
        )


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided for one batch. T tokens, E experts, N kept assignments, k choices.

    Attributes:
        token_ids: the token of each assignment.
        expert_ids: the expert of each assignment.
        gates: the weight with which the expert's output enters the token's.
        logits: raw router logits, before softmax, padding included.
        valid: False where a token is padding; padding enters no loss and no statistic.
        segments: for each token the number of its example within the batch, padding included (its
            value there is arbitrary).
        choices: what tokens asked for before capacity; k is 0 where experts choose.
    """

    token_ids: Int[Tensor, " N"]
    expert_ids: Int[Tensor, " N"]
    gates: Float[Tensor, " N"]
    logits: Float[Tensor, "T E"]
    valid: Bool[Tensor, " T"]
    segments: Int[Tensor, " T"]
    choices: Choices

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.logits.shape[0]

    @property
    def num_experts(self) -> int:
        """Number of experts that the router chooses from."""
        return self.logits.shape[1]

    @property
    def num_dropped(self) -> Int[Tensor, ""]:
        """Number of choices that were asked for and did not fit."""
        asked = self.choices.asked.sum()
        # Where experts choose, nobody asked.
        return asked - len(self.token_ids) if self.choices.asked.shape[1] else asked

    @classmethod
    def from_top_k(
        cls,
        logits: Float[Tensor, "T E"],
        expert_ids: Int[Tensor, "T k"],
        gates: Float[Tensor, "T k"],
        *,
        valid: Bool[Tensor, " T"] | None = None,
        segments: Int[Tensor, " T"] | None = None,
    ) -> "Routing":
        """Build from what a dropless top-k router returns; padding is left out of the list.

        Without `valid` every token counts; without `segments` the batch is one segment.
        """
        num_tokens, top_k = expert_ids.shape
        if valid is None:
            valid = torch.ones(num_tokens, dtype=torch.bool, device=logits.device)
        if segments is None:
            segments = torch.zeros(num_tokens, dtype=torch.long, device=logits.device)
        asked = valid.unsqueeze(1).expand(-1, top_k)
        kept = asked.reshape(-1).nonzero()[:, 0]
        return cls(
            token_ids=kept // top_k,
            expert_ids=expert_ids.reshape(-1)[kept],
            gates=gates.reshape(-1)[kept],
            logits=logits,
            valid=valid,
            segments=segments,
            choices=Choices(expert_ids, asked),
        )

    @property
    def forced(self) -> ForcedRouting:
        """What a router must be given to decide the same again."""
        return ForcedRouting(self.token_ids, self.expert_ids, self.choices)

    def expert_counts(self) -> Int[Tensor, " E"]:
        """Number of kept assignments of each expert: its load."""
        return torch.bincount(self.expert_ids, minlength=self.num_experts)

    def asked_pairs(self, *, first_only: bool = False) -> tuple[Tensor, Tensor]:
        """Return token and expert ids (M,) of what was asked for, dropped or not.

        Args:
            first_only: leave out all but each token's first choice.
        """
        width = min(self.choices.expert_ids.shape[1], 1 if first_only else self.num_experts)
        asked = self.choices.asked[:, :width]
        return asked.nonzero()[:, 0], self.choices.expert_ids[:, :width][asked]

    def slots(self) -> tuple[Int[Tensor, "T S"], Float[Tensor, "T S"]]:
        """Return the list as one row a token: expert ids and gates.

        S is the largest number of experts that any token has. A slot without an assignment holds
        the expert id E, which expert compute reads as "no expert", and the gate 0.
        """
        positions = places(self.token_ids)
        width = int(positions.max()) + 1 if len(positions) else 0
        expert_ids = self.expert_ids.new_full((self.num_tokens, width), self.num_experts)
        expert_ids[self.token_ids, positions] = self.expert_ids
        gates = self.gates.new_zeros(expert_ids.shape)
        return expert_ids, gates.index_put((self.token_ids, positions), self.gates)


def numbered(values: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Number the values that occur from 0 without gaps."""
    return torch.unique(values, return_inverse=True)[1]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def places(cells: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Return for each entry how many earlier entries have the same value."""
    order = cells.argsort(stable=True)
    counts = torch.bincount(cells)
    starts = counts.cumsum(0) - counts
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), device=order.device) - starts[cells[order]]
    return found


def require_finite_logits(
    logits: Float[Tensor, "T E"], valid: Bool[Tensor, " T"], *, router: str
) -> None:
    """Refuse logits with NaN or infinity for a token that is not padding.

    Raises:
        ModelError: names the router, the number of such tokens, and the first of them.
    """
    broken = ~logits.detach().isfinite().all(dim=1) & valid
    if broken.any():
        first = int(broken.nonzero()[0, 0])
        raise ModelError(
            f"Router logits must be finite, but {router} gave NaN or infinity for "
            f"{int(broken.sum())} of {int(valid.sum())} tokens, the first is token {first}. Its "
            "input has overflowed: lower the learning rate, or go back to the last checkpoint."
        )
