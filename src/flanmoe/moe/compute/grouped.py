"""`expert_ffn`: checks what comes in, decides how to compute it, and computes it."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.core.errors import ModelError
from flanmoe.moe.compute.activations import (
    POINTWISE,
    AnyCombine,
    Combine,
    Gated,
    Plain,
    captured_parameters,
)
from flanmoe.moe.compute.autograd import grouped_ffn
from flanmoe.moe.compute.fused import FusedExperts
from flanmoe.moe.compute.grouping import group
from flanmoe.moe.compute.linear import ExpertLinear, FullMatrices
from flanmoe.moe.compute.low_rank import LowRankFactors, LowRankMatrices
from flanmoe.moe.compute.products import ASKED_FOR, Choice, product_choice
from flanmoe.moe.compute.triton_pass import require_triton
from flanmoe.moe.compute.work import Work


def expert_ffn(
    hidden: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T k"],
    gates: Float[Tensor, "T k"],
    experts: FusedExperts,
) -> Float[Tensor, "T H"]:
    """Return for each token the gate-weighted sum of its experts' outputs.

    Assignments are sorted by expert, so that each expert that is used does one product over its own
    tokens. Under autocast products are made in its dtype. Gates enter and choices are added in
    float32 (float64 stays float64), in an order that does not depend on how threads happen to run.
    `product_path` says how products are made. `torch.compile` leaves the function as it is: how many
    rows an expert has is known only when it runs.

    Raises:
        ModelError: if an expert id is negative or above the number of experts, a gate is NaN or
            infinite, sizes do not fit, tensors differ in dtype outside autocast, an activation is to be
            kept that autograd differentiates, or Triton's kernels are asked for what they cannot do.
    """
    if experts.split is not None:
        # Ids that are no expert reach the check of each part as they are.
        inside = expert_ids.clamp(0, experts.num_experts)
        parts = experts.split(inside)
        outputs = [
            expert_ffn(
                hidden,
                torch.where(inside == expert_ids, part.expert_ids, expert_ids),
                gates,
                part.experts,
            )
            for part in parts
        ]
        return torch.stack(outputs).sum(dim=0)
    _require_sizes(hidden, experts)
    _require_dtypes(hidden, experts)
    _require_known_activation(experts)
    return _computed(hidden, expert_ids, gates, experts)


def _computed(
    hidden: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T k"],
    gates: Float[Tensor, "T k"],
    experts: FusedExperts,
) -> Float[Tensor, "T H"]:
    return grouped_ffn(_work(hidden, expert_ids, gates, experts), hidden, gates)


# Compilers leave it out: how many rows an expert has is known only when it runs.
_computed = torch.compiler.disable(_computed)  # pyright: ignore


def product_path(hidden: Float[Tensor, "T H"], experts: FusedExperts) -> Choice:
    """Return how `expert_ffn` would make products of such hidden states here and now, and why."""
    if experts.kernels == "triton":
        return ASKED_FOR
    rows = hidden.new_empty(0, hidden.shape[1], dtype=_products_dtype(hidden))
    return product_choice(rows, experts.gate_up.transpose(1, 2))


def _work(
    hidden: Float[Tensor, "T H"],
    expert_ids: Int[Tensor, "T k"],
    gates: Float[Tensor, "T k"],
    experts: FusedExperts,
) -> Work:
    dtype = _products_dtype(hidden)
    work = Work(
        grouping=group(expert_ids, gates, experts.num_experts),
        first=_linear(experts, experts.gate_up, "gate_up"),
        second=_linear(experts, experts.down, "down"),
        first_bias=experts.gate_up_bias,
        second_bias=experts.down_bias,
        combine=_combine(experts.combine, experts.gate_up[:1, :, 0].to(dtype)),
        norm=None
        if experts.output_norm is None
        else _any(experts.output_norm, experts.down[:1, :, 0].to(dtype)),
        hidden_dropout=experts.hidden_dropout,
        observer=experts.observer,
        dtype=dtype,
        keep=False,
        keep_activation=experts.keep_activation,
        kernels=experts.kernels,
    )
    if work.kernels == "triton":
        require_triton(work)
    return work.kept_for_backward(hidden, gates)


def _linear(experts: FusedExperts, weight: Float[Tensor, "E B A"], name: str) -> ExpertLinear:
    change = experts.low_rank
    factors: LowRankFactors | None = None if change is None else change.factors.get(name)
    if change is None:
        return FullMatrices(weight)
    if factors is None:
        return FullMatrices(weight.detach())
    return LowRankMatrices.of(weight.detach(), factors, dropout=change.dropout)


def _combine(function: Callable[[Tensor], Tensor], example: Float[Tensor, "N F"]) -> Combine:
    return function if isinstance(function, Plain | Gated) else _any(function, example)


def _any(function: Callable[[Tensor], Tensor], example: Float[Tensor, "N F"]) -> AnyCombine:
    device = example.device.type
    autocast = partial(
        torch.autocast,
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
    )
    captured: Sequence[Tensor] = ()
    if torch.is_grad_enabled():
        captured = captured_parameters(function, example)
    return AnyCombine(function, captured, autocast)


def _products_dtype(hidden: Float[Tensor, "T H"]) -> torch.dtype:
    """Return the dtype of products: autocast's, which leaves float64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _require_sizes(hidden: Float[Tensor, "T H"], experts: FusedExperts) -> None:
    sizes = (experts.gate_up.shape[2], experts.down.shape[1])
    if sizes != (hidden.shape[1], hidden.shape[1]):
        raise ModelError(
            f"Experts take and give hidden states of one size, but these take {sizes[0]} and give {sizes[1]} "
            f"numbers, and the hidden states have {hidden.shape[1]}."
        )


def _require_dtypes(hidden: Float[Tensor, "T H"], experts: FusedExperts) -> None:
    if torch.is_autocast_enabled(hidden.device.type):
        return
    named = {
        "gate_up": experts.gate_up,
        "down": experts.down,
        "gate_up_bias": experts.gate_up_bias,
        "down_bias": experts.down_bias,
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ModelError(
                f"Hidden states and experts must have one dtype outside autocast, but the hidden states are "
                f"{hidden.dtype} and `{name}` is {tensor.dtype}. Convert the model with `model.to`, or "
                "run it under torch.autocast."
            )


def _require_known_activation(experts: FusedExperts) -> None:
    if experts.keep_activation and not isinstance(experts.combine, Plain | Gated):
        raise ModelError(
            f"Activations can be kept where their derivative is written out ({', '.join(POINTWISE)}; gated or "
            f"alone), but these experts compute `{_name(experts.combine)}` between their products, which is "
            "run again under autograd. Leave `keep_activation` out for them."
        )


def _name(function: Callable[[Tensor], Tensor]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
