"""`Routing`: what a router decided for one batch, as an assignment list.

Token choice, capacity drops and expert choice are the same thing here: a list of (token, expert, gate)
triples. A token that was dropped, or that no expert chose, is simply absent (DESIGN 5.5).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router decided for one batch. T tokens, E experts, N kept assignments.

    Attributes:
        token_ids: the token of each assignment.
        expert_ids: the expert of each assignment.
        gates: the weight with which the expert's output enters the token's.
        logits: raw router logits, before softmax, padding included.
        valid: False where a token is padding; padding enters no loss and no statistic.
        segments: for each token the number of its example within the batch, padding included (its value
            there is arbitrary).
    """

    token_ids: Int[Tensor, " N"]
    expert_ids: Int[Tensor, " N"]
    gates: Float[Tensor, " N"]
    logits: Float[Tensor, "T E"]
    valid: Bool[Tensor, " T"]
    segments: Int[Tensor, " T"]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.logits.shape[0]

    @property
    def num_experts(self) -> int:
        """Number of experts that the router chooses from."""
        return self.logits.shape[1]

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
        kept = valid.repeat_interleave(top_k)
        token_ids = torch.arange(num_tokens, device=logits.device).repeat_interleave(top_k)
        return cls(
            token_ids=token_ids[kept],
            expert_ids=expert_ids.reshape(-1)[kept],
            gates=gates.reshape(-1)[kept],
            logits=logits,
            valid=valid,
            segments=segments,
        )

    def expert_counts(self) -> Int[Tensor, " E"]:
        """Number of kept assignments of each expert."""
        return torch.bincount(self.expert_ids, minlength=self.num_experts)
