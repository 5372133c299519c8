"""Activations of experts kept for the backward pass, which otherwise computes them again.

They lie between the two products of every routed expert, one number for each unit of each visited
expert. Results stay the same; memory is traded for time. Shared experts and dense FFNs keep their
activations in any case.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

from torch import nn

from flanmoe.core.errors import ModelError
from flanmoe.models.blocks import moe_blocks
from flanmoe.models.experts_interface import fused_experts, named_activation
from flanmoe.models.own_compute import require_own_compute
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.compute import POINTWISE, Gated, Plain, keep_activation, set_keep_activation
from flanmoe.moe.layer import Experts


@contextmanager
def kept_activation(model: nn.Module, keep: bool) -> Generator[None]:
    """Keep activations of experts inside the `with` block, or compute them again; as before it afterwards.

    The model may be on the meta device.

    Raises:
        ModelError: if they are to be kept and the model is dense, or its experts run something else than
            flanmoe's compute or have an activation whose derivative is not written out.
    """
    blocks = moe_blocks(model)
    if keep:
        _require_known(model, blocks)
    before = [(block.experts, keep_activation(block.experts)) for block in blocks]
    for module, _ in before:
        set_keep_activation(module, keep)
    try:
        yield
    finally:
        for module, value in before:
            set_keep_activation(module, value)


def _require_known(model: nn.Module, blocks: Sequence[MoEBlock]) -> None:
    if not blocks:
        raise ModelError(
            "`keep_expert_activation` needs a sparse model where it is true, but is true for "
            f"{type(model).__name__}, which is dense. Set it to false, or make the model sparse first "
            "with `flanmoe upcycle`."
        )
    for block in blocks:
        require_own_compute(block, need="Keeping activations needs experts that", any_kernels=True)
        _require_written_out(block)


def _require_written_out(block: MoEBlock) -> None:
    # Ours have no other activations.
    if isinstance(block.experts, Experts):
        return
    if not isinstance(fused_experts(block.experts).combine, Plain | Gated):
        raise ModelError(
            "`keep_expert_activation` needs experts whose activation has its derivative written out "
            f"({', '.join(POINTWISE)}; gated or alone), but those of {block.name} compute "
            f"`{named_activation(block.experts)}`, which is run again under autograd. Set it to false."
        )
