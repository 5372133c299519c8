"""`OutputSums`: what the experts of one layer returned, as sums that add up over batches and processes.

Outputs are those before gates. G groups of tokens (tasks), T tokens, N assignments, E experts, H hidden size.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from flanmoe.moe.compute import ExpertOutputs


@dataclass(frozen=True, slots=True)
class OutputSums:
    """What one layer's experts made of the tokens that were sent to them. Padding enters nothing.

    A norm is the Euclidean norm of one output, a sum runs over the tokens of a group that an expert served.

    Attributes:
        counts: outputs.
        norms: sum of their norms.
        squared_norms: sum of the squares of their norms.
        gated_norms: sum of gate times norm.
        share_norms: sum of norm times the gate's share of all gates of the token: gate times norm as if the
            gates of the chosen experts were renormalised to sum to 1.
        largest_norm: the largest norm of any group, 0 for an expert without tokens.
        outputs: sum of the outputs over all groups.
    """

    counts: Int[Tensor, "G E"]
    norms: Float[Tensor, "G E"]
    squared_norms: Float[Tensor, "G E"]
    gated_norms: Float[Tensor, "G E"]
    share_norms: Float[Tensor, "G E"]
    largest_norm: Float[Tensor, " E"]
    outputs: Float[Tensor, "E H"]

    @classmethod
    def none(cls, num_groups: int, num_experts: int, hidden_size: int) -> "OutputSums":
        """Return the sums over no tokens."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.double)

        return cls(
            counts=torch.zeros(num_groups, num_experts, dtype=torch.long),
            norms=zeros(num_groups, num_experts),
            squared_norms=zeros(num_groups, num_experts),
            gated_norms=zeros(num_groups, num_experts),
            share_norms=zeros(num_groups, num_experts),
            largest_norm=zeros(num_experts),
            outputs=zeros(num_experts, hidden_size),
        )

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        shown: ExpertOutputs,
        valid: Bool[Tensor, " T"],
        groups: Int[Tensor, " T"],
        *,
        num_groups: int,
        num_experts: int,
    ) -> "OutputSums":
        """Add up what one layer's experts returned in one pass.

        Args:
            shown: what `observed_outputs` shows, sorted by expert.
            valid: False where a token is padding, to which native routers send experts too.
            groups: for each token the number of its group, arbitrary for padding.
            num_groups, num_experts: how many.
        """
        exact = torch.promote_types(shown.outputs.dtype, torch.float32)
        kept = valid[shown.token_ids].nonzero()[:, 0]
        expert_ids, token_ids = shown.expert_ids[kept], shown.token_ids[kept]
        gates = shown.gates[kept].double()
        norms = torch.linalg.vector_norm(shown.outputs, dim=1, dtype=exact)[kept].double()
        columns = torch.stack(
            [
                torch.ones_like(norms),
                norms,
                norms.square(),
                gates * norms,
                _shares(gates, token_ids, len(valid)) * norms,
            ]
        )
        cells = (groups[token_ids] * num_experts + expert_ids).expand(len(columns), -1)
        sums = columns.new_zeros(len(columns), num_groups * num_experts)
        sums = sums.scatter_add_(1, cells, columns).view(-1, num_groups, num_experts)
        largest = norms.new_zeros(num_experts)
        return cls(
            # Whole numbers are exact in float64 up to 2^53.
            counts=sums[0].long(),
            norms=sums[1],
            squared_norms=sums[2],
            gated_norms=sums[3],
            share_norms=sums[4],
            largest_norm=largest.scatter_reduce_(0, expert_ids, norms, "amax"),
            outputs=_summed_by_expert(shown.outputs.to(exact), kept, expert_ids, num_experts),
        )

    def __add__(self, other: "OutputSums") -> "OutputSums":
        own, theirs = self.tensors(), other.tensors()
        summed = {name: own[name] + theirs[name].to(own[name].device) for name in own}
        summed["largest_norm"] = torch.maximum(
            self.largest_norm, other.largest_norm.to(self.largest_norm.device)
        )
        return OutputSums(**summed)

    def cpu(self) -> "OutputSums":
        """Return the sums in the computer's own memory."""
        return OutputSums(**{name: values.cpu() for name, values in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def mean_outputs(self) -> Float[Tensor, "E H"]:
        """Return each expert's mean output over the tokens that it served, 0 where there were none."""
        return self.outputs / self.counts.sum(dim=0).clamp(min=1).unsqueeze(1)


def _shares(
    gates: Float[Tensor, " N"], token_ids: Int[Tensor, " N"], num_tokens: int
) -> Float[Tensor, " N"]:
    totals = gates.new_zeros(num_tokens).index_add_(0, token_ids, gates)[token_ids]
    return torch.where(totals == 0, 0.0, gates / totals)


def _summed_by_expert(
    outputs: Float[Tensor, "N H"],
    kept: Int[Tensor, " M"],
    expert_ids: Int[Tensor, " M"],
    num_experts: int,
) -> Float[Tensor, "E H"]:
    """Return for each expert the sum of those of its outputs that are kept.

    Rows are read where they lie: copying those that are kept costs several times as much, and weighting the
    others with 0 lets through what is NaN for padding.

    Args:
        outputs: sorted by expert.
        kept: the rows to add, ascending.
        expert_ids: of these rows.
        num_experts: how many.
    """
    counts = torch.bincount(expert_ids, minlength=num_experts)
    sums = F.embedding_bag(kept, outputs, counts.cumsum(0) - counts, mode="sum")
    return sums.double()
