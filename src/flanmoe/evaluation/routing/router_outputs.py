"""What the routers of a model return in one pass, kept as it is.

`RoutingRecorder` reads each layer's decision as soon as the pass ends: some twenty small operations a layer.
A step of generation takes one token a row, and there they cost several percent of it. Kept instead, the
outputs of many steps are read together.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from flanmoe.core.errors import ModelError
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing import require_finite_logits


@contextmanager
def router_outputs(blocks: Sequence[MoEBlock]) -> Generator[list[Any]]:
    """Yield a list that holds what each block's router returned once the `with` block has ended.

    Raises:
        ModelError: if a router does not run exactly once, or its logits are no numbers.
    """
    found: list[list[Any]] = [[] for _ in blocks]
    kept: list[Any] = []
    with ExitStack() as hooks:
        for block, own in zip(blocks, found, strict=True):
            hooks.callback(block.router.register_forward_hook(_keeping(own)).remove)
        try:
            yield kept
        except ModelError:
            # Experts refuse gates that are no numbers, and cannot say whose they are.
            _check_logits(blocks, found)
            raise
    for block, own in zip(blocks, found, strict=True):
        if len(own) != 1:
            raise ModelError(
                f"Every router must run once in a pass, but the router of {block.name} ran {len(own)} times. "
                "The routing of such a model cannot be recorded yet."
            )
        kept += own


def joined(
    labels: Sequence[Int[Tensor, " _"]], returned: Sequence[Any]
) -> Iterator[tuple[Int[Tensor, " T"], Any]]:
    """Yield the labels and outputs of one router over several passes as few pieces.

    Args:
        labels: of the tokens of each pass.
        returned: what the router returned in each pass (see `MoEBlock.routing`).
    """
    if not all(isinstance(one, tuple) for one in returned):
        # Our own routers return a `Routing`, whose tokens are numbered within their pass.
        yield from zip(labels, returned, strict=True)
        return
    # Tokens may lie along one axis or along those of batch and place.
    parts = [
        torch.cat([part.reshape(-1, part.shape[-1]) for part in same])
        for same in zip(*returned, strict=True)
    ]
    yield torch.cat(list(labels)), tuple(parts)


def _check_logits(blocks: Sequence[MoEBlock], found: Sequence[Sequence[Any]]) -> None:
    for block, own in zip(blocks, found, strict=True):
        for returned in own:
            routing = block.routing(returned)
            name = f"the router of {block.name}"
            require_finite_logits(routing.logits, routing.valid, router=name)


def _keeping(own: list[Any]) -> Any:
    def hook(_module: Any, _arguments: Any, returned: Any) -> None:
        own.append(returned)

    return hook
