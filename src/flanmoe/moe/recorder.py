"""Recording what routers decide while a model runs, with the gradient through their logits.

Routers are read with forward hooks, so that losses and monitoring attach to any model from outside.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flanmoe.core.errors import ModelError
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing import Routing, require_finite_logits


class RoutingRecorder:
    """Records the `Routing` of every sparse block during one forward pass.

    One recording is open at a time; the next one may follow when it has ended.

    Args:
        blocks: the sparse blocks of a model, in layer order; none for a dense model, which then
            records nothing.
    """

    def __init__(self, blocks: Sequence[MoEBlock]) -> None:
        self.blocks = tuple(blocks)
        self._is_open = False

    @contextmanager
    def recording(
        self,
        *,
        valid: Bool[Tensor, " T"] | None = None,
        segments: Int[Tensor, " T"] | None = None,
    ) -> Generator[list[Routing]]:
        """Record one forward pass made inside the `with` block.

        Yields a list that is filled as the routers run and is in layer order and complete when the
        block ends. Gradients flow through the logits; gates are detached. What activation
        checkpointing computes again during a backward pass is neither added nor put in place of
        what was recorded.

        Args:
            valid: False where a token is padding; without it every token counts.
            segments: for each token the number of its example; without it the batch is one.

        Raises:
            ModelError: if a recording of this recorder is open already, if a router runs twice or not
                at all, or runs without gradients where the caller has them on (reentrant activation
                checkpointing does that).
        """
        self._require_closed()
        layers: list[Routing] = []
        recorded: dict[int, Routing] = {}
        needs_gradient = torch.is_grad_enabled()

        def record(index: int, returned: Any) -> None:
            if _in_backward_pass():
                return
            block = self.blocks[index]
            if index in recorded:
                raise ModelError(
                    f"A recording holds one forward pass, but the router of {block.name} ran twice "
                    "in it. Open a recording for each pass."
                )
            if needs_gradient and not torch.is_grad_enabled():
                raise ModelError(_without_gradient(block.name))
            recorded[index] = block.routing(returned, valid=valid, segments=segments)
            layers[:] = [recorded[position] for position in sorted(recorded)]

        with ExitStack() as hooks:
            self._is_open = True
            hooks.callback(self._close)
            for index, block in enumerate(self.blocks):
                hook = block.router.register_forward_hook(_hook(record, index))
                hooks.callback(hook.remove)
            try:
                yield layers
            except ModelError:
                # Experts refuse gates that are no numbers, and cannot say whose they are.
                self._check_logits(recorded)
                raise
        self._check_complete(recorded)
        # After the pass, so that no layer waits for the one before it to be read.
        self._check_logits(recorded)

    def _require_closed(self) -> None:
        if self._is_open:
            names = f"the blocks from {self.blocks[0].name} on" if self.blocks else "a dense model"
            raise ModelError(
                f"A RoutingRecorder holds one recording at a time, but one of {names} is still open. "
                "End it first, or make a second RoutingRecorder of the same blocks."
            )

    def _close(self) -> None:
        self._is_open = False

    def _check_logits(self, recorded: Mapping[int, Routing]) -> None:
        for index, routing in recorded.items():
            name = f"the router of {self.blocks[index].name}"
            require_finite_logits(routing.logits, routing.valid, router=name)

    def _check_complete(self, recorded: Mapping[int, Routing]) -> None:
        missing = [block.name for index, block in enumerate(self.blocks) if index not in recorded]
        if missing:
            raise ModelError(
                f"A recording needs one forward pass through all {len(self.blocks)} routers, but "
                f"{', '.join(missing)} did not run. Run the model inside the recording."
            )


def _hook(record: Callable[[int, Any], None], index: int) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, arguments: Any, returned: Any) -> None:
        record(index, returned)

    return hook


def _in_backward_pass() -> bool:
    # The number of the running backward pass, -1 outside one; torch.utils.checkpoint asks the same.
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage]


def _without_gradient(name: str) -> str:
    return (
        "Router losses need gradients through the recorded logits, but the router of "
        f"{name} ran without them, as under reentrant activation checkpointing. "
        "Enable it with `use_reentrant=False`."
    )
