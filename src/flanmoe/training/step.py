"""`Step`: an optimizer step in the making, put together from its micro-batches, and what is told of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flanmoe.moe.routing_measures import measures_of_layers
from flanmoe.moe.stacked_sums import StackedSums
from flanmoe.training.in_one_go import Change, in_one_go
from flanmoe.training.report import RouterReport, StepReport
from flanmoe.training.router_losses import LayerUse, RouterLossConfig, RouterLosses
from flanmoe.training.rows import StepTotals


@dataclass(slots=True)
class Step:
    """The optimizer step in the making.

    Attributes:
        totals: what it holds over all processes.
        of_layers: of that what the routers of each sparse layer see, those of its side.
        num_batches: micro-batches on this process.
        done: how many of them have been through the model.
        cross_entropy: sum of what they added to the cross-entropy.
        losses: the same for the raw router losses; None for a dense model.
        use: expert use in what they asked for, layer by layer, where a scope keeps it.
        routing: what the routers did, by task; None where nobody asks.
        counted_tokens, counting_seconds: what counting them beforehand took.
    """

    totals: StepTotals
    of_layers: Sequence[StepTotals]
    num_batches: int
    done: int = 0
    cross_entropy: Tensor | float = 0.0
    losses: RouterLosses | None = None
    use: list[LayerUse] = field(default_factory=list[LayerUse])
    routing: StackedSums | None = None
    counted_tokens: int = 0
    counting_seconds: float = 0.0

    def add(
        self,
        cross_entropy: Tensor,
        losses: RouterLosses | None,
        use: Sequence[LayerUse],
        routing: StackedSums | None,
    ) -> None:
        """Add what one micro-batch of this process found."""
        self.done += 1
        self.cross_entropy = self.cross_entropy + cross_entropy.detach()
        if losses is not None:
            losses = losses.detached()
            self.losses = self.losses + losses if self.losses else losses
            self.use = added(self.use, use)
        if routing is not None:
            self.routing = self.routing + routing if self.routing else routing

    def sum_over(self, processes: Callable[[Tensor], Tensor]) -> None:
        """Replace what this process found by the sums over all processes, in one go.

        Args:
            processes: adds up a tensor over them; every process must call this.
        """
        in_one_go(self._each, processes)
        self.cross_entropy = float(self.cross_entropy)

    def report(
        self, number: int, config: RouterLossConfig, *, learning_rate: float, gradient_norm: float
    ) -> StepReport:
        """Return what the finished step did, once its sums are over all processes."""
        cross_entropy = float(self.cross_entropy)
        router = self._router_report(config)
        return StepReport(
            step=number,
            totals=self.totals,
            cross_entropy=cross_entropy,
            loss=cross_entropy + (sum(router.weighted.values()) if router else 0.0),
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            router=router,
            counted_tokens=self.counted_tokens,
            counting_seconds=self.counting_seconds,
        )

    def _router_report(self, config: RouterLossConfig) -> RouterReport | None:
        if self.losses is None:
            return None
        in_one_go(self._each_routing, lambda values: values.cpu())
        layers = self.routing.layers() if self.routing else []
        measures = measures_of_layers([layer.together() for layer in layers])
        raw = {name: float(value) for name, value in self.losses.raw(config).items()}
        weights = config.weights._asdict()
        return RouterReport(
            balance_per_layer=tuple(self.losses.balance.tolist()),
            raw=raw,
            weighted={name: weights[name] * value for name, value in raw.items()},
            routing=tuple(layers),
            measures=tuple(measured for (measured,) in measures),
        )

    def _each(self, change: Change) -> None:
        self.cross_entropy = change(torch.as_tensor(self.cross_entropy))
        self.losses = self.losses.summed(change) if self.losses else None
        self.use = [layer.summed(change) for layer in self.use]
        self._each_routing(change)

    def _each_routing(self, change: Change) -> None:
        self.routing = self.routing.changed(change) if self.routing else None


def added(total: Sequence[LayerUse], layers: Sequence[LayerUse]) -> list[LayerUse]:
    """Add layer by layer to what there is, if there is anything."""
    if not total:
        return list(layers)
    return [old + new for old, new in zip(total, layers, strict=True)]
