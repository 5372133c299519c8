"""The router losses of one optimizer step, put together from its micro-batches.

The balance loss is a product of two means (how often an expert is chosen, how likely it was), so the
losses of micro-batches do not simply add up to that of their step. Four scopes say what the counts
are taken over. Everything here is per layer first; the mean over layers comes last.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from flanmoe.core.config import Config
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.losses import balance_loss, sequence_balance_loss, z_loss
from flanmoe.moe.routing import Routing
from flanmoe.training.rows import StepTotals


class RouterLossConfig(Config):
    """Coefficients and scope of the router losses.

    Attributes:
        balance_coefficient: factor of the load-balancing loss (k when balanced); 0 turns it off.
        z_coefficient: factor of the router z-loss; 0 turns it off.
        scope: what the balance loss counts expert use over: the tokens of the whole optimizer step
            (`global`), of the step before (`lagged`), of each example (`sequence`), or of each
            micro-batch (`micro_batch`, which makes the loss depend on how a step is cut).
    """

    balance_coefficient: float = Field(default=0.01, ge=0)
    z_coefficient: float = Field(default=0.001, ge=0)
    scope: Literal["sequence", "global", "lagged", "micro_batch"] = "global"

    @property
    def is_on(self) -> bool:
        """Whether either loss has a coefficient above 0."""
        return self.balance_coefficient > 0 or self.z_coefficient > 0


class BalanceScope(ABC):
    """What the balance loss counts expert use over.

    Attributes:
        needs_counts: whether the expert counts of a whole step must be known before its first loss.
    """

    needs_counts = False

    def start_step(  # noqa: B027 - most scopes need not do anything
        self, counts: Sequence[Int[Tensor, " _"]], totals: StepTotals
    ) -> None:
        """Take the expert counts of the step that begins, where `needs_counts` is set."""

    @abstractmethod
    def share(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return what one micro-batch adds to the balance loss of one layer in this step."""

    def finish_step(  # noqa: B027
        self, counts: Sequence[Int[Tensor, " _"]], totals: StepTotals
    ) -> None:
        """Take the expert counts of the step that ends."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, as plain JSON types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what `state_dict` gave."""


@final
class SequenceScope(BalanceScope):
    """Every example by itself: additive, so it does not depend on how a step is cut."""

    def share(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the sum over the examples of the micro-batch, over the examples of the step."""
        return sequence_balance_loss(routing, num_sequences=totals.examples)


@final
class MicroBatchScope(BalanceScope):
    """Every micro-batch by itself, then their mean, as common trainers do.

    Not invariant: smaller micro-batches ask for balance over fewer tokens.
    """

    def share(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the loss of the micro-batch alone, over the number of micro-batches."""
        return balance_loss(routing) / totals.micro_batches


class _CountedScope(BalanceScope):
    """Fixed fractions of the whole step, against which each micro-batch sets its probabilities."""

    def __init__(self) -> None:
        self._fractions: list[Tensor] = []

    def share(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the micro-batch's part of the sum over the tokens of the step."""
        fractions = self._fractions[layer].to(routing.logits.device)
        return balance_loss(routing, fractions=fractions, num_tokens=totals.real_tokens)

    def _set(self, counts: Sequence[Int[Tensor, " _"]], num_tokens: int) -> None:
        self._fractions = [layer.double() / max(num_tokens, 1) for layer in counts]


@final
class GlobalScope(_CountedScope):
    """All tokens of the step, over all micro-batches and processes.

    Does not depend on how a step is cut. Steps of several micro-batches need a pass without
    gradients over all of them first.
    """

    needs_counts = True

    def start_step(self, counts: Sequence[Int[Tensor, " _"]], totals: StepTotals) -> None:
        """Take the counts of the step that begins."""
        self._set(counts, totals.real_tokens)


@final
class LaggedScope(_CountedScope):
    """Expert use of the step before against the probabilities of this one.

    Does not depend on how a step is cut, and costs nothing. The first step assumes even use.

    Args:
        num_experts, top_k: counts of each sparse layer.
    """

    def __init__(self, num_experts: Sequence[int], top_k: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(num_experts, top_k, strict=True)
        self._counts = [[k] * num for num, k in pairs]
        self._num_tokens = list(num_experts)
        self._use()

    def finish_step(self, counts: Sequence[Int[Tensor, " _"]], totals: StepTotals) -> None:
        """Keep the counts for the next step."""
        self._counts = [layer.tolist() for layer in counts]
        self._num_tokens = [max(totals.real_tokens, 1)] * len(counts)
        self._use()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the last step."""
        return {"counts": self._counts, "num_tokens": self._num_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the counts of the last step."""
        self._counts = [list(layer) for layer in state["counts"]]
        self._num_tokens = list(state["num_tokens"])
        self._use()

    def _use(self) -> None:
        pairs = zip(self._counts, self._num_tokens, strict=True)
        self._fractions = [torch.tensor(layer).double() / number for layer, number in pairs]


def balance_scope(config: RouterLossConfig, blocks: Sequence[MoEBlock]) -> BalanceScope:
    """Build the scope that a configuration names, for the sparse blocks of a model.

    With a coefficient of 0 the balance loss is only a reading, not worth a pass of its own: it is
    then that of the micro-batches, whatever scope is named.
    """
    match config.scope if config.balance_coefficient > 0 else "micro_batch":
        case "sequence":
            return SequenceScope()
        case "micro_batch":
            return MicroBatchScope()
        case "global":
            return GlobalScope()
        case "lagged":
            num_experts = [block.num_experts for block in blocks]
            return LaggedScope(num_experts, [block.top_k for block in blocks])


@dataclass(frozen=True, slots=True)
class RouterLosses:
    """What one micro-batch adds to the router losses of its step. L sparse layers.

    Attributes:
        balance: raw balance loss of each layer.
        z: raw z-loss of each layer.
    """

    balance: Float[Tensor, " L"]
    z: Float[Tensor, " L"]

    def weighted(self, config: RouterLossConfig) -> Float[Tensor, ""]:
        """Return what enters the loss: the mean over layers, times the coefficients."""
        balance = config.balance_coefficient * self.balance.mean()
        return balance + config.z_coefficient * self.z.mean()


def router_losses(
    layers: Sequence[Routing], *, scope: BalanceScope, totals: StepTotals
) -> RouterLosses:
    """Return what a micro-batch adds to the router losses of its step, layer by layer.

    Args:
        layers: what the routers decided for the micro-batch; at least one layer.
        scope: what the balance loss counts expert use over.
        totals: what the whole step holds.
    """
    balance = [scope.share(number, routing, totals) for number, routing in enumerate(layers)]
    z = [z_loss(routing, num_tokens=totals.real_tokens) for routing in layers]
    return RouterLosses(balance=torch.stack(balance), z=torch.stack(z))
