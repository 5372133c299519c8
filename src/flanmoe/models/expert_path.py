"""Which way the experts of a model are computed, in words: what somebody who tunes should not have to guess."""

from collections.abc import Sequence

import torch

from flanmoe.models.experts_interface import (
    KERNELS,
    experts_implementation,
    fused_experts,
)
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute import product_path
from flanmoe.moe.layer import Experts


def expert_path(
    blocks: Sequence[MoEBlock], *, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return how the experts of a model compute, with the reason; None for a dense model.

    Args:
        blocks: its sparse blocks.
        dtype: of the products, that of autocast where there is one.
        device: where it will compute.
    """
    if not blocks:
        return None
    experts = blocks[0].experts
    if isinstance(experts, Experts):
        fused = experts.fused()
    elif (found := experts_implementation(experts)) not in KERNELS:
        return f"transformers' {found}"
    else:
        fused = fused_experts(experts)
    hidden = torch.empty(0, blocks[0].hidden_size, dtype=dtype, device=device)
    choice = product_path(hidden, fused)
    return f"{choice.path}: {choice.reason}"
