"""`Step`: an optimizer step in the making, put together from its micro-batches, and what is told of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from flanmoe.moe.routing import Routing
from flanmoe.training.drops import LayerDrops
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
        counts: assignments that each expert got, layer by layer.
        drops: what found no expert, layer by layer.
        counted_tokens, counting_seconds: what counting them beforehand took.
    """

    totals: StepTotals
    of_layers: Sequence[StepTotals]
    num_batches: int
    done: int = 0
    cross_entropy: Tensor | float = 0.0
    losses: RouterLosses | None = None
    use: list[LayerUse] = field(default_factory=list[LayerUse])
    counts: list[Tensor] = field(default_factory=list[Tensor])
    drops: list[LayerDrops] = field(default_factory=list[LayerDrops])
    counted_tokens: int = 0
    counting_seconds: float = 0.0

    def add(
        self,
        cross_entropy: Tensor,
        losses: RouterLosses | None,
        layers: Sequence[Routing],
        use: Sequence[LayerUse],
    ) -> None:
        """Add what one micro-batch of this process found."""
        self.done += 1
        self.cross_entropy = self.cross_entropy + cross_entropy.detach()
        if losses is not None:
            losses = losses.detached()
            self.losses = self.losses + losses if self.losses else losses
            self.use = added(self.use, use)
            self.counts = added(self.counts, [layer.expert_counts() for layer in layers])
            self.drops = added(self.drops, [LayerDrops.of(layer) for layer in layers])

    def sum_over(self, processes: Callable[[Tensor], Tensor]) -> None:
        """Replace what this process found by the sums over all processes.

        Args:
            processes: adds up a tensor over them; every process must call this.
        """
        self.counts = [processes(layer) for layer in self.counts]
        self.drops = [layer.summed(processes) for layer in self.drops]
        self.cross_entropy = float(processes(torch.as_tensor(self.cross_entropy)))
        self.use = [layer.summed(processes) for layer in self.use]
        if self.losses:
            self.losses = self.losses.summed(processes)

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
        raw = {name: float(value) for name, value in self.losses.raw(config).items()}
        weights = config.weights._asdict()
        return RouterReport(
            balance_per_layer=tuple(self.losses.balance.tolist()),
            raw=raw,
            weighted={name: weights[name] * value for name, value in raw.items()},
            counts=tuple(counts.cpu() for counts in self.counts),
            drops=tuple(LayerDrops(layer.counts.cpu()) for layer in self.drops),
        )


_T = TypeVar("_T", Tensor, LayerUse, LayerDrops)


def added(total: Sequence[_T], layers: Sequence[_T]) -> list[_T]:
    """Add layer by layer to what there is, if there is anything."""
    if not total:
        return list(layers)
    return [old + new for old, new in zip(total, layers, strict=True)]
