"""The sum that defines expert compute, written out."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.moe.compute.fused import FusedExperts


def expert_ffn_reference(
    hidden: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T k"],
    gates: Float[Tensor, "T k"],
    experts: FusedExperts,
) -> Float[Tensor, "T H"]:
    """Define `expert_ffn` without dropout: the sum over tokens and choices. Slow; for tests."""
    rows = [torch.zeros_like(row) for row in hidden]
    for token in range(hidden.shape[0]):
        for choice in range(expert_ids.shape[1]):
            expert = int(expert_ids[token, choice])
            if expert < experts.num_experts:
                output = _written_out(hidden[token], expert, experts)
                rows[token] = rows[token] + gates[token, choice] * output
    return torch.stack(rows) if rows else torch.zeros_like(hidden)


def _written_out(
    token: Float[Tensor, " H"], expert: int, experts: FusedExperts
) -> Float[Tensor, " H"]:
    product = experts.gate_up[expert] @ token
    if experts.gate_up_bias is not None:
        product = product + experts.gate_up_bias[expert]
    output = experts.down[expert] @ experts.combine(product)
    if experts.down_bias is not None:
        output = output + experts.down_bias[expert]
    return output if experts.output_norm is None else experts.output_norm(output)
