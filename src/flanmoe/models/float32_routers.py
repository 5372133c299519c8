"""Routers in float32 under autocast.

Under bfloat16 autocast a router's product is a bfloat16 product too. Its logits then have eight
bits, and experts that are clearly apart tie; after granular upcycling a tie between two groups
sends a token to halves of different groups, which is not the dense model any more. The router is a
thousandth of the work, so it is kept in the type of its weights (Switch Transformer, arXiv
2101.03961, section 2.4: selective precision).
"""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from flanmoe.models.blocks import moe_blocks


@final
class _OutsideAutocast:
    """A router's forward, run without autocast in the type of the router's weights."""

    def __init__(self, router: nn.Module, forward: Callable[..., Any]) -> None:
        self._router = router
        self._forward = forward

    def __call__(self, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        dtype = next(self._router.parameters()).dtype
        with torch.autocast(hidden.device.type, enabled=False):
            return self._forward(hidden.to(dtype), *arguments, **named)


def keep_routers_in_float32(model: nn.Module) -> int:
    """Make every router of a sparse model compute outside autocast; doing it twice changes nothing.

    Args:
        model: any model, changed in place; its weights and what is saved stay as they are.

    Returns:
        Number of routers of the model, 0 for a dense one.
    """
    routers = [block.router for block in moe_blocks(model)]
    for router in routers:
        if not isinstance(router.forward, _OutsideAutocast):
            # nn.Module calls `self.forward`; an attribute of the instance stands in front of the
            # method.
            router.forward = _OutsideAutocast(router, router.forward)
    return len(routers)
