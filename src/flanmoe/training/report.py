"""`StepReport`: what one optimizer step did, as told to the callbacks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from flanmoe.moe.routing_measures import RoutingMeasures
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.training.rows import StepTotals

_WORST: Mapping[str, Callable[[Iterable[float]], float]] = {
    "entropy_share": min,
    "max_over_mean": max,
    "unused_share": max,
    "dropped_share": max,
    "unserved_share": max,
    "logit_rms": max,
}
_MEAN = ("entropy_share", "router_entropy_share", "confidence")


@dataclass(frozen=True, slots=True)
class RouterReport:
    """Router losses and expert use of one step of a sparse model, over all processes.

    Attributes:
        balance_per_layer: raw balance loss of each sparse layer.
        raw: by name of the loss, over all layers and before its coefficient.
        weighted: by name of the loss, what entered the training loss.
        routing: what the routers did, layer by layer, a group for each task; on the CPU, and empty
            where nobody asked for it.
        measures: the same of all tasks together, as ratios.
    """

    balance_per_layer: tuple[float, ...]
    raw: Mapping[str, float]
    weighted: Mapping[str, float]
    routing: tuple[RoutingSums, ...] = ()
    measures: tuple[RoutingMeasures, ...] = ()

    @property
    def worst(self) -> dict[str, float]:
        """Return the measures in which a layer can be worse than others, of the worst layer each."""
        scalars = [layer.scalars() for layer in self.measures]
        return {
            name: worst(layer[name] for layer in scalars)
            for name, worst in _WORST.items()
            if scalars
        }

    @property
    def mean(self) -> dict[str, float]:
        """Return the mean over layers of each measure."""
        scalars = [layer.scalars() for layer in self.measures]
        return {name: fmean(layer[name] for layer in scalars) for name in _MEAN if scalars}

    def layer_metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Return the measures of each layer by the names that trackers get, given the layers' names."""
        return {
            f"routing/{layer}/{name}": value
            for layer, measured in zip(names, self.measures, strict=False)
            for name, value in measured.scalars().items()
        }


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
        """Return the numbers of this step by the names they are logged under.

        Names that begin with `routing/` are paths in the step's row of `routing.jsonl`.
        """
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
            metrics |= {f"routing/worst/{name}": x for name, x in self.router.worst.items()}
            metrics |= {f"routing/mean/{name}": x for name, x in self.router.mean.items()}
        return metrics
