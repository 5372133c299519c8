"""The router losses of one optimizer step, put together from its micro-batches.

The balance loss is a product of two means (how often an expert is chosen, how likely it was), and the
importance loss a square of means, so the losses of micro-batches do not simply add up to that of
their step. Four scopes say what is taken over which tokens. Everything here is per layer first;
layers are put together last, as the convention says. The layers of an encoder see other tokens than
those of a decoder, so every layer is divided by the totals of what it sees.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from flanmoe.core.config import Config
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.losses import (
    CONVENTIONS,
    Convention,
    ConventionName,
    Counting,
    asked_counts,
    balance_loss,
    importance_loss,
    probability_sums,
    sequence_balance_loss,
    sequence_importance_loss,
    z_loss,
)
from flanmoe.moe.routing import Routing
from flanmoe.training.rows import StepTotals


class RouterLossConfig(Config):
    """Coefficients, convention and scope of the router losses.

    Attributes:
        balance_coefficient: factor of the load-balancing loss; 0 turns it off.
        importance_coefficient: factor of the importance loss (squared coefficient of variation of
            the experts' summed probabilities); 0, the default, turns it off.
        z_coefficient: factor of the router z-loss; 0 turns it off.
        convention: whose coefficients these are; says which choices the balance loss counts and
            whether layers are averaged or added up (`flanmoe.moe.losses.CONVENTIONS`).
        scope: what balance and importance are taken over: the tokens of the whole optimizer step
            (`global`), of the step before (`lagged`), of each example (`sequence`), or of each
            micro-batch (`micro_batch`, which makes the loss depend on how a step is cut).
    """

    balance_coefficient: float = Field(default=0.01, ge=0)
    importance_coefficient: float = Field(default=0.0, ge=0)
    z_coefficient: float = Field(default=0.001, ge=0)
    convention: ConventionName = "t5x"
    scope: Literal["sequence", "global", "lagged", "micro_batch"] = "global"

    @property
    def is_on(self) -> bool:
        """Whether any loss enters the training loss."""
        return self.needs_scope or self.weights.z > 0

    @property
    def needs_scope(self) -> bool:
        """Whether a loss that depends on the scope enters the training loss."""
        return self.balance_coefficient > 0 or self.importance_coefficient > 0

    @property
    def rules(self) -> Convention:
        """What the named convention says."""
        return CONVENTIONS[self.convention]

    @property
    def weights(self) -> "LossWeights":
        """What each loss is multiplied by after its layers have been put together."""
        z = self.z_coefficient * self.rules.z_factor(self.balance_coefficient)
        return LossWeights(self.balance_coefficient, self.importance_coefficient, z)


class LossWeights(NamedTuple):
    """Factors of the balance, importance and z-loss."""

    balance: float
    importance: float
    z: float


@dataclass(frozen=True, slots=True)
class LayerUse:
    """How some tokens use the experts of one layer. Sums of several batches describe them together.

    Attributes:
        asked: tokens that asked for each expert.
        probabilities: sum of their router probabilities for it.
    """

    asked: Int[Tensor, " E"]
    probabilities: Float[Tensor, " E"]

    @classmethod
    def of(cls, routing: Routing, counting: Counting) -> "LayerUse":
        """Count one layer's routing."""
        with torch.no_grad():
            sums = probability_sums(routing).double()
        return cls(asked_counts(routing, counting=counting), sums)

    def __add__(self, other: "LayerUse") -> "LayerUse":
        return LayerUse(self.asked + other.asked, self.probabilities + other.probabilities)

    def summed(self, over: Callable[[Tensor], Tensor]) -> "LayerUse":
        """Return the values added up by `over`, a sum over processes."""
        return LayerUse(over(self.asked), over(self.probabilities))


# What a whole step holds: the same for all layers, or for each layer what its routers see of it.
Totals = StepTotals | Sequence[StepTotals]


class Scope(ABC):
    """What the balance and the importance loss are taken over.

    Attributes:
        needs_use: whether the expert use of a whole step must be known before its first loss.
        keeps_use: whether that of a finished step must be known for the next one.
    """

    needs_use = False
    keeps_use = False

    def start_step(  # noqa: B027 - most scopes need not do anything
        self, use: Sequence[LayerUse], totals: Totals
    ) -> None:
        """Take the expert use of the step that begins, where `needs_use` is set."""

    @abstractmethod
    def balance(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return what one micro-batch adds to the balance loss of one layer in this step.

        Args:
            layer: number of the layer among the sparse ones.
            routing: what its router decided for the micro-batch.
            totals: what the whole step holds of the tokens that it sees.
        """

    @abstractmethod
    def importance(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return what one micro-batch adds to the importance loss of one layer in this step."""

    def finish_step(  # noqa: B027
        self, use: Sequence[LayerUse], totals: Totals
    ) -> None:
        """Take the expert use of the step that ends, where `keeps_use` is set."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, as plain JSON types."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what `state_dict` gave."""


@final
class SequenceScope(Scope):
    """Every example by itself: additive, so it does not depend on how a step is cut.

    Args:
        counting: choices that the balance loss counts.
    """

    def __init__(self, counting: Counting) -> None:
        self._counting: Counting = counting

    def balance(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the sum over the examples of the micro-batch, over the examples of the step."""
        return sequence_balance_loss(
            routing, counting=self._counting, num_sequences=totals.examples
        )

    def importance(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the sum over the examples of the micro-batch, over the examples of the step."""
        return sequence_importance_loss(routing, num_sequences=totals.examples)


@final
class MicroBatchScope(Scope):
    """Every micro-batch by itself, then their mean, as common trainers do.

    Not invariant: smaller micro-batches ask for balance over fewer tokens.

    Args:
        counting: choices that the balance loss counts.
    """

    def __init__(self, counting: Counting) -> None:
        self._counting: Counting = counting

    def balance(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the loss of the micro-batch alone, over the number of micro-batches."""
        return balance_loss(routing, counting=self._counting) / totals.micro_batches

    def importance(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the loss of the micro-batch alone, over the number of micro-batches."""
        return importance_loss(routing) / totals.micro_batches


class _FixedUseScope(Scope):
    """Fixed use by a whole step, against which each micro-batch sets its probabilities."""

    def __init__(self) -> None:
        self._fractions: list[Tensor] = []
        self._means: list[Tensor] = []

    def balance(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the micro-batch's part of the sum over the tokens of the step."""
        fractions = self._fractions[layer].to(routing.logits.device)
        return balance_loss(routing, fractions=fractions, num_tokens=totals.real_tokens)

    def importance(self, layer: int, routing: Routing, totals: StepTotals) -> Float[Tensor, ""]:
        """Return the micro-batch's part of the loss's tangent at the use of the whole step."""
        means = self._means[layer].to(routing.logits.device)
        return importance_loss(routing, means=means, num_tokens=totals.real_tokens)

    def _set(self, use: Sequence[LayerUse], num_tokens: Sequence[int]) -> None:
        pairs = list(zip(use, num_tokens, strict=True))
        self._fractions = [layer.asked.double() / max(number, 1) for layer, number in pairs]
        self._means = [layer.probabilities.double() / max(number, 1) for layer, number in pairs]


@final
class GlobalScope(_FixedUseScope):
    """All tokens of the step, over all micro-batches and processes.

    Does not depend on how a step is cut. Steps of several micro-batches need a pass without
    gradients over all of them first.
    """

    needs_use = True

    def start_step(self, use: Sequence[LayerUse], totals: Totals) -> None:
        """Take the use of the step that begins."""
        self._set(use, [of_layer.real_tokens for of_layer in _of_layers(totals, len(use))])


@final
class LaggedScope(_FixedUseScope):
    """Expert use of the step before against the probabilities of this one.

    Does not depend on how a step is cut, and costs nothing. The first step assumes even use.

    Args:
        num_experts, num_choices: counts of each sparse layer; of the choices those that the balance
            loss counts.
    """

    keeps_use = True

    def __init__(self, num_experts: Sequence[int], num_choices: Sequence[int]) -> None:
        super().__init__()
        self._take(
            [
                LayerUse(
                    torch.full((experts,), choices, dtype=torch.long),
                    torch.ones(experts, dtype=torch.double),
                )
                for experts, choices in zip(num_experts, num_choices, strict=True)
            ],
            list(num_experts),
        )

    def finish_step(self, use: Sequence[LayerUse], totals: Totals) -> None:
        """Keep the use for the next step."""
        seen = _of_layers(totals, len(use))
        self._take(use, [max(of_layer.real_tokens, 1) for of_layer in seen])

    def state_dict(self) -> dict[str, Any]:
        """Return the use of the last step."""
        return {
            "asked": [layer.asked.tolist() for layer in self._use],
            "probabilities": [layer.probabilities.tolist() for layer in self._use],
            "num_tokens": self._num_tokens,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the use of the last step."""
        pairs = zip(state["asked"], state["probabilities"], strict=True)
        use = [
            LayerUse(torch.tensor(asked), torch.tensor(sums, dtype=torch.double))
            for asked, sums in pairs
        ]
        self._take(use, list(state["num_tokens"]))

    def _take(self, use: Sequence[LayerUse], num_tokens: list[int]) -> None:
        self._use = list(use)
        self._num_tokens = num_tokens
        self._set(self._use, num_tokens)


def scope_of(config: RouterLossConfig, blocks: Sequence[MoEBlock]) -> Scope:
    """Build the scope that a configuration names, for the sparse blocks of a model.

    With both coefficients at 0 the losses are only readings, not worth a pass of their own: they
    are then those of the micro-batches, whatever scope is named.
    """
    counting = config.rules.counting
    match config.scope if config.needs_scope else "micro_batch":
        case "sequence":
            return SequenceScope(counting)
        case "micro_batch":
            return MicroBatchScope(counting)
        case "global":
            return GlobalScope()
        case "lagged":
            choices = [
                min(block.top_k, 1) if counting == "first" else block.top_k for block in blocks
            ]
            return LaggedScope([block.num_experts for block in blocks], choices)


@dataclass(frozen=True, slots=True)
class RouterLosses:
    """Raw router losses of each layer: what one micro-batch adds, or of a whole step. L layers."""

    balance: Float[Tensor, " L"]
    importance: Float[Tensor, " L"]
    z: Float[Tensor, " L"]

    def __add__(self, other: "RouterLosses") -> "RouterLosses":
        return self._with(lambda name: getattr(self, name) + getattr(other, name))

    def detached(self) -> "RouterLosses":
        """Return the same values without gradients."""
        return self._with(lambda name: getattr(self, name).detach())

    def summed(self, over: Callable[[Tensor], Tensor]) -> "RouterLosses":
        """Return the values added up by `over`, a sum over processes."""
        return self._with(lambda name: over(getattr(self, name)))

    def raw(self, config: RouterLossConfig) -> dict[str, Float[Tensor, ""]]:
        """Return each loss over all layers, before its coefficient."""
        return {name: config.rules.over_layers(getattr(self, name)) for name in LossWeights._fields}

    def weighted(self, config: RouterLossConfig) -> dict[str, Float[Tensor, ""]]:
        """Return what each loss adds to the training loss."""
        weights = config.weights._asdict()
        return {name: weights[name] * value for name, value in self.raw(config).items()}

    def total(self, config: RouterLossConfig) -> Float[Tensor, ""]:
        """Return what they add to the training loss together."""
        return torch.stack(list(self.weighted(config).values())).sum()

    def _with(self, values: Callable[[str], Tensor]) -> "RouterLosses":
        return RouterLosses(**{name: values(name) for name in LossWeights._fields})


def router_losses(
    layers: Sequence[Routing], *, scope: Scope, totals: Totals, weights: LossWeights
) -> RouterLosses:
    """Return what a micro-batch adds to the router losses of its step, layer by layer.

    Args:
        layers: what the routers decided for the micro-batch; at least one layer.
        scope: what balance and importance are taken over.
        totals: what the whole step holds, of what each layer sees where they differ.
        weights: a loss with weight 0 is a reading, which carries no gradient.
    """

    of_layer = _of_layers(totals, len(layers))

    def z(layer: int, routing: Routing, seen: StepTotals) -> Float[Tensor, ""]:
        return z_loss(routing, num_tokens=seen.real_tokens)

    def of_layers(loss: Callable[..., Tensor], weight: float) -> Float[Tensor, " L"]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            values = [
                loss(number, routing, seen)
                for number, (routing, seen) in enumerate(zip(layers, of_layer, strict=True))
            ]
            return torch.stack(values)

    return RouterLosses(
        balance=of_layers(scope.balance, weights.balance),
        importance=of_layers(scope.importance, weights.importance),
        z=of_layers(z, weights.z),
    )


def _of_layers(totals: Totals, number: int) -> Sequence[StepTotals]:
    return [totals] * number if isinstance(totals, StepTotals) else totals
