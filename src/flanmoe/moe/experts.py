"""Expert compute: one fast function for every sparse block, and the sum that defines it.

Axes: T tokens, k choices a token, E experts, H hidden size, I expert width, F width of the first
product (2I for gated experts). An expert id of E or above stands for "no expert": the assignment
adds nothing. That is how a dropped token, or an expert that lives on another rank, is written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

# Rows of an expert are rounded up to a multiple of this where kernels are compiled for each shape.
ROW_MULTIPLE = 32
# Attribute of an experts module that holds its rate of expert dropout.
_HIDDEN_DROPOUT = "flanmoe_hidden_dropout"


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """The matrices of all experts of one block, and what happens between them.

    An expert computes `output_norm(down @ combine(gate_up @ x + gate_up_bias) + down_bias)`, in
    training with dropout on what `combine` returns (expert dropout).

    Attributes:
        gate_up: first matrices, fused; views with other strides are fine.
        down: second matrices.
        combine: turns the first product (N, F) into the second's input (N, I); see `gated`.
        gate_up_bias, down_bias: biases, None where there are none.
        output_norm: applied to each expert's output, None for the identity.
        hidden_dropout: share of `combine`'s outputs that is set to 0, the rest scaled up by
            1 / (1 - share); drawn from torch's global generator, expert after expert. Leave it at 0
            outside training.
    """

    gate_up: Float[Tensor, "E F H"]
    down: Float[Tensor, "E H I"]
    combine: Callable[[Tensor], Tensor]
    gate_up_bias: Float[Tensor, "E F"] | None = None
    down_bias: Float[Tensor, "E H"] | None = None
    output_norm: Callable[[Tensor], Tensor] | None = None
    hidden_dropout: float = 0.0

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.gate_up.shape[0]


def hidden_dropout(experts: nn.Module) -> float:
    """Return the rate of expert dropout that an experts module trains with, 0 if none was set."""
    return getattr(experts, _HIDDEN_DROPOUT, 0.0)


def set_hidden_dropout(experts: nn.Module, rate: float) -> None:
    """Set the rate of expert dropout that an experts module, ours or not, trains with."""
    setattr(experts, _HIDDEN_DROPOUT, rate)


class SingleExpert(NamedTuple):
    """Views of one expert's matrices and biases."""

    gate_up: Float[Tensor, "F H"]
    down: Float[Tensor, "H I"]
    gate_up_bias: Float[Tensor, " F"] | None
    down_bias: Float[Tensor, " H"] | None


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `activation(gate) * up` for products whose first half is the gate (SwiGLU and its kin)."""

    def combine(product: Tensor) -> Tensor:
        gate, up = product.chunk(2, dim=-1)
        return activation(gate) * up

    return combine


def expert_ffn(
    hidden: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T k"],
    gates: Float[Tensor, "T k"],
    experts: FusedExperts,
) -> Float[Tensor, "T H"]:
    """Return for each token the gate-weighted sum of its experts' outputs.

    Assignments are sorted by expert, so that each expert that is used does one product over its own
    tokens. Gates enter and choices are added in float32 (float64 stays float64), always in the
    order of the choices: the result does not depend on how threads happen to run.
    """
    num_tokens, top_k = expert_ids.shape
    flat_ids = expert_ids.reshape(-1)
    order = flat_ids.argsort(stable=True)
    # Both gathers run over a permutation. Their backward passes therefore add every row exactly
    # once, whereas hidden[order // k] would add k rows into one place in whatever order the device
    # likes.
    choices = hidden.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)
    outputs = _run_sorted(choices.index_select(0, order), flat_ids, experts)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    outputs = outputs.index_select(0, back).view(num_tokens, top_k, hidden.shape[-1])
    accumulate = torch.promote_types(outputs.dtype, torch.float32)
    weighted = outputs.to(accumulate) * gates.to(accumulate).unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden.dtype)


def _run_sorted(
    rows: Float[Tensor, "N H"], flat_ids: Int[Tensor, " N"], experts: FusedExperts
) -> Float[Tensor, "N H"]:
    """Run each expert on its consecutive rows; rows past the last expert's give zeros."""
    counts = _counts(flat_ids, experts.num_experts)
    round_up = _compiles_per_shape(rows)
    parts: list[Tensor] = []
    start = 0
    for expert, single in enumerate(_unbound(experts)):
        if counts[expert] == 0:
            continue
        own = rows[start : start + counts[expert]]
        if round_up and counts[expert] > ROW_MULTIPLE:
            own = F.pad(own, (0, 0, 0, -counts[expert] % ROW_MULTIPLE))
        parts.append(_one_expert(own, single, experts)[: counts[expert]])
        start += counts[expert]
    if start < rows.shape[0] or not parts:
        parts.append(torch.zeros_like(rows[start:], dtype=parts[0].dtype if parts else rows.dtype))
    return torch.cat(parts)


def _compiles_per_shape(rows: Float[Tensor, "N H"]) -> bool:
    """Say whether products run in oneDNN, as bfloat16 ones do on the CPU.

    It compiles a kernel for every number of rows that it meets and keeps the last thousand. Experts
    meet a new number almost every time, so rows are rounded up there: measured on SmolLM2's size, a
    third less time and half a gigabyte less memory.
    """
    if rows.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return rows.dtype == torch.bfloat16


def _unbound(experts: FusedExperts) -> list[SingleExpert]:
    """Return views of every expert's matrices.

    One unbind for each parameter: indexing it inside autograd would allocate a gradient of its full
    size for every expert.
    """
    none = (None,) * experts.num_experts
    return [
        SingleExpert(*matrices)
        for matrices in zip(
            experts.gate_up.unbind(),
            experts.down.unbind(),
            none if experts.gate_up_bias is None else experts.gate_up_bias.unbind(),
            none if experts.down_bias is None else experts.down_bias.unbind(),
            strict=True,
        )
    ]


def _one_expert(
    rows: Float[Tensor, "N H"], single: SingleExpert, experts: FusedExperts
) -> Float[Tensor, "N H"]:
    product = F.linear(rows, single.gate_up, single.gate_up_bias)
    inner = experts.combine(product)
    if experts.hidden_dropout:
        inner = F.dropout(inner, experts.hidden_dropout)
    output = F.linear(inner, single.down, single.down_bias)
    return output if experts.output_norm is None else experts.output_norm(output)


def _counts(flat_ids: Int[Tensor, " N"], num_experts: int) -> list[int]:
    counts: list[int] = torch.bincount(flat_ids, minlength=num_experts).tolist()  # pyright: ignore
    return counts


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
