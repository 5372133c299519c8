"""Experts that must run flanmoe's compute: no other implementation looks at what is set beside them."""

from flanmoe.core.errors import ModelError
from flanmoe.models.experts_interface import (
    EXPERTS_IMPLEMENTATION,
    KERNELS,
    experts_implementation,
)
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.layer import Experts


def require_own_compute(
    block: MoEBlock, *, need: str, otherwise: str = "", any_kernels: bool = False
) -> None:
    """Refuse experts that run another implementation; on the meta device none compute.

    Args:
        block: whose experts are looked at.
        need: how the message begins, up to "run flanmoe's compute".
        otherwise: what else may be done, behind the way out.
        any_kernels: whether our kernels do as well as torch's.

    Raises:
        ModelError: names the block and what its experts run.
    """
    on_meta = all(weight.is_meta for weight in block.experts.parameters())
    if on_meta or isinstance(block.experts, Experts):
        return
    found = experts_implementation(block.experts)
    if found not in (KERNELS if any_kernels else (EXPERTS_IMPLEMENTATION,)):
        raise ModelError(
            f"{need} run flanmoe's compute, but those of {block.name} run `{found}`. Call "
            f'`model.set_experts_implementation("{EXPERTS_IMPLEMENTATION}")` first{otherwise}.'
        )
