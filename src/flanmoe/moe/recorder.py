"""Recording what routers decide while a model runs, with the gradient through their logits.

Routers are read with forward hooks, so that losses and monitoring attach to any model from outside.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flanmoe.core.errors import ModelError
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing import Routing, require_finite_logits


class RoutingRecorder:
    """Records the `Routing` of every sparse block during one forward pass.

    Args:
        blocks: the sparse blocks of a model, in layer order; none for a dense model, which then
            records nothing.
    """

    def __init__(self, blocks: Sequence[MoEBlock]) -> None:
        self.blocks = tuple(blocks)

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
            ModelError: if a router runs twice or not at all, or runs without gradients where the
                caller has them on (reentrant activation checkpointing does that).
        """
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
            for index, block in enumerate(self.blocks):
                hook = block.router.register_forward_hook(_hook(record, index))
                hooks.callback(hook.remove)
            yield layers
        self._check_complete(recorded)
        # After the pass, so that no layer waits for the one before it to be read.
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


class ExpertLoad:
    """Running counts of how often each expert of each layer was chosen.

    Args:
        num_experts: number of experts of each sparse layer.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._counts = [torch.zeros(number, dtype=torch.long) for number in num_experts]

    @property
    def counts(self) -> tuple[Int[Tensor, " _"], ...]:
        """Assignments of each expert so far, layer by layer."""
        return tuple(counts.clone() for counts in self._counts)

    def update(self, counts: Sequence[Int[Tensor, " _"]]) -> None:
        """Add the assignments of one batch, layer by layer (`Routing.expert_counts`).

        Raises:
            ValueError: if the number of layers or experts differs.
        """
        for total, new in zip(self._counts, counts, strict=True):
            if total.shape != new.shape:
                raise ValueError(f"A layer has {len(total)} experts, but {len(new)} counts came.")
            total += new.to(total.device)

    def to_mapping(self) -> list[dict[str, Any]]:
        """Return for each layer what was counted and how uneven it is, as plain JSON types.

        `fractions` sum to 1. `entropy_nats` is that of `fractions` (ln E when even), `unused_share`
        the share of experts never chosen, `max_over_mean` the largest count over the mean (1 when
        even). A layer that has seen nothing has 0 everywhere.
        """
        return [_layer_load(counts) for counts in self._counts]

    def state_dict(self) -> dict[str, Any]:
        """Return the counts as plain JSON types."""
        return {"counts": [[int(count) for count in counts] for counts in self._counts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over counts that `state_dict` gave for a model of the same shape.

        Raises:
            ValueError: if the number of layers or experts differs.
        """
        counts = [torch.tensor(values, dtype=torch.long) for values in state["counts"]]
        found = [len(values) for values in counts]
        expected = [len(values) for values in self._counts]
        if found != expected:
            raise ValueError(f"The layers have {expected} experts, but the state has {found}.")
        self._counts = counts


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


def _layer_load(counts: Int[Tensor, " E"]) -> dict[str, Any]:
    total = int(counts.sum())
    fractions: Float[Tensor, " E"] = counts.double() / max(total, 1)
    used = fractions[fractions > 0]
    return {
        "counts": [int(count) for count in counts],
        "fractions": [float(fraction) for fraction in fractions],
        "entropy_nats": abs(float(-(used * used.log()).sum())),
        "unused_share": float((counts == 0).double().mean()) if total else 0.0,
        "max_over_mean": float(fractions.max()) * len(counts),
    }
