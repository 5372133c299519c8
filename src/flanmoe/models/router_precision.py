"""Routers that stay in float32 when the rest of the model computes in bfloat16.

Under autocast a router's logits carry 8 bits, so that experts tie although their scores differ. For
a freshly upcycled model in mode `granular` a tie between two groups splits them, and the token loses
half of its FFN (what that does to the logits: `benchmarks/results/router_precision.json`). Routers are
a thousandth of the work; running them in float32 costs nothing (the selective precision of arXiv
2101.03961).
"""

from typing import Any

import torch
from torch import Tensor, nn

from flanmoe.models.blocks import moe_blocks


class _OutsideAutocast:
    """Mixed into a router's class: its forward runs in the precision of its own weights."""

    def forward(self: Any, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        dtype = next(self.parameters()).dtype
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(dtype), *arguments, **options)  # pyright: ignore


def run_routers_outside_autocast(model: nn.Module) -> None:
    """Let every router of a model compute in the precision of its weights; doing it twice is once.

    The class of each router is replaced by a subclass of the same name, which survives copying the
    model. Weights, names and hooks stay as they are.
    """
    for block in moe_blocks(model):
        kind = type(block.router)
        if not issubclass(kind, _OutsideAutocast):
            block.router.__class__ = type(kind.__name__, (_OutsideAutocast, kind), {})
