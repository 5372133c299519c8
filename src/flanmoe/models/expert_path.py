"""Which way the experts of a model are computed, in words: what somebody who tunes should not have to guess."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from flanmoe.models.experts_interface import EXPERTS_IMPLEMENTATION
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute.products import product_choice


def expert_path(
    model: PreTrainedModel, blocks: Sequence[MoEBlock], *, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return how the experts of a model compute, with the reason; None where there are no fused experts.

    Args:
        model: the model.
        blocks: its sparse blocks.
        dtype: of the products, that of autocast where there is one.
        device: where it will compute.
    """
    if not blocks:
        return None
    implementation = getattr(model.config, "_experts_implementation", None)
    if implementation not in (None, EXPERTS_IMPLEMENTATION):
        return f"transformers' {implementation}"
    matrices = [parameter for parameter in blocks[0].experts.parameters() if parameter.dim() == 3]
    if not matrices:
        return None
    like = torch.empty(0, *matrices[0].shape[1:], dtype=dtype, device=device).mT
    choice = product_choice(like[:, :, 0], like)
    return f"{choice.path}: {choice.reason}"
