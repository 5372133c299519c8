"""`expert_ffn`: assignments sorted by expert, one product for each expert over its own tokens."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from flanmoe.moe.compute.fused import ExpertOutputs, FusedExperts

# Rows of an expert are rounded up to a multiple of this where kernels are compiled for each shape.
ROW_MULTIPLE = 32


class SingleExpert(NamedTuple):
    """Views of one expert's matrices and biases."""

    gate_up: Float[Tensor, "F H"]
    down: Float[Tensor, "H I"]
    gate_up_bias: Float[Tensor, " F"] | None
    down_bias: Float[Tensor, " H"] | None


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
    if experts.observer is not None:
        _show(outputs, flat_ids[order], order // max(top_k, 1), gates.reshape(-1)[order], experts)
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


def _show(
    outputs: Float[Tensor, "N H"],
    expert_ids: Int[Tensor, " N"],
    token_ids: Int[Tensor, " N"],
    gates: Float[Tensor, " N"],
    experts: FusedExperts,
) -> None:
    """Show the observer what was computed; assignments to no expert are the last ones."""
    kept = int((expert_ids < experts.num_experts).sum())
    assert experts.observer is not None
    shown = ExpertOutputs(outputs[:kept], expert_ids[:kept], token_ids[:kept], gates[:kept])
    experts.observer(ExpertOutputs(*(values.detach() for values in shown)))


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
