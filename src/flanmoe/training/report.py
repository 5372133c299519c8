"""`StepReport`: what one optimizer step did, as told to the callbacks."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from flanmoe.training.drops import LayerDrops
from flanmoe.training.rows import StepTotals


@dataclass(frozen=True, slots=True)
class RouterReport:
    """Router losses and expert use of one step of a sparse model, over all processes.

    Attributes:
        balance_per_layer: raw balance loss of each sparse layer.
        raw: by name of the loss, over all layers and before its coefficient.
        weighted: by name of the loss, what entered the training loss.
        counts: assignments of each expert, layer by layer.
        drops: what found no expert, layer by layer.
    """

    balance_per_layer: tuple[float, ...]
    raw: Mapping[str, float]
    weighted: Mapping[str, float]
    counts: tuple[Int[Tensor, " _"], ...]
    drops: tuple[LayerDrops, ...]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did, over all processes.

    Attributes:
        step: number of the step, from 1.
        totals: the rows and tokens it was made of.
        cross_entropy: mean over the loss tokens of the step, in nats.
        loss: cross-entropy plus weighted router losses.
        learning_rate: that of the step.
        gradient_norm: before clipping.
        router: None for a dense model.
        counted_tokens: tokens that went through the model once more to count expert use.
        counting_seconds: how long that took.
    """

    step: int
    totals: StepTotals
    cross_entropy: float
    loss: float
    learning_rate: float
    gradient_norm: float
    router: RouterReport | None
    counted_tokens: int
    counting_seconds: float

    def metrics(self) -> dict[str, float]:
        """Return the numbers of this step by the names they are logged under."""
        metrics = {
            "loss": self.loss,
            "loss/cross_entropy": self.cross_entropy,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
        }
        if self.router is not None:
            for name, value in self.router.raw.items():
                metrics[f"router/{name}_raw"] = value
                metrics[f"router/{name}_weighted"] = self.router.weighted[name]
        return metrics
