"""`LayerStatistics`: what one sparse layer did with the tokens that it saw."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flanmoe.models.flan_moe_t5.configuration import Side
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.statistics.logit_sample import LogitSample
from flanmoe.statistics.output_sums import OutputSums
from flanmoe.statistics.parts import StatisticsParts


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What one sparse layer did.

    Attributes:
        name: dotted path of the block inside its model.
        layer: number of the transformer layer that holds it; each side counts its own.
        side: whose tokens it sees.
        num_experts, top_k: counts; `top_k` is 0 where experts choose their tokens.
        hidden_size: size of an output.
        norm_top_k: whether the gates of the chosen experts are renormalised to sum to a constant.
        sums: of the routing, by group; with co-activation where it was asked for.
        outputs: sums of what experts returned; None where they were not asked for.
        logit_sample: None where it was not asked for.
    """

    name: str
    layer: int
    side: Side
    num_experts: int
    top_k: int
    hidden_size: int
    norm_top_k: bool
    sums: RoutingSums
    outputs: OutputSums | None = None
    logit_sample: LogitSample | None = None

    @classmethod
    def none(
        cls, block: MoEBlock, side: Side, num_groups: int, parts: StatisticsParts
    ) -> "LayerStatistics":
        """Return the statistics of a block over no tokens."""
        experts = block.num_experts
        return cls(
            name=block.name,
            layer=block.layer,
            side=side,
            num_experts=experts,
            top_k=block.top_k,
            hidden_size=block.hidden_size,
            norm_top_k=block.norm_top_k,
            sums=RoutingSums.none(num_groups, experts, coactivation=parts.coactivation),
            outputs=OutputSums.none(num_groups, experts, block.hidden_size)
            if parts.outputs
            else None,
            logit_sample=LogitSample.none(experts) if parts.logit_sample else None,
        )

    @property
    def shape(self) -> dict[str, str | int | bool]:
        """What the layer is, apart from what it did, as plain JSON types."""
        return {
            "name": self.name,
            "layer": self.layer,
            "side": self.side,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "hidden_size": self.hidden_size,
            "norm_top_k": self.norm_top_k,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return what was gathered by name, without the tokens of the sample, which layers share."""
        named = {f"routing.{name}": values for name, values in self.sums.tensors().items()}
        if self.outputs is not None:
            named |= {f"outputs.{name}": values for name, values in self.outputs.tensors().items()}
        if self.logit_sample is not None:
            named["logits"] = self.logit_sample.logits
        return named

    @classmethod
    def of_tensors(
        cls,
        shape: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        sampled: tuple[Tensor, Tensor] | None,
    ) -> "LayerStatistics":
        """Return what `shape` and `tensors` said, with the numbers and groups of the sampled tokens."""
        outputs = _below("outputs.", tensors)
        return cls(
            **shape,
            sums=RoutingSums(**_below("routing.", tensors)),
            outputs=OutputSums(**outputs) if outputs else None,
            logit_sample=None if sampled is None else LogitSample(*sampled, tensors["logits"]),
        )

    def added(self, other: "LayerStatistics", sample: LogitSample | None) -> "LayerStatistics":
        """Return the statistics over the tokens of both, whose sample has been drawn already."""
        outputs = self.outputs
        if outputs is not None and other.outputs is not None:
            outputs = outputs + other.outputs
        return replace(self, sums=self.sums + other.sums, outputs=outputs, logit_sample=sample)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): values
        for name, values in tensors.items()
        if name.startswith(prefix)
    }
