"""How much memory statistics hold, from shapes alone."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from flanmoe.statistics.expert_statistics import ExpertStatistics
from flanmoe.statistics.layer_statistics import LayerStatistics
from flanmoe.statistics.parts import StatisticsParts
from flanmoe.statistics.readable import Blocks, readable_blocks

_MIB = 2**20
_NUMBER_BYTES = 8
_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """Bytes that statistics hold in the end, by part.

    Attributes:
        routing: counts, gates, entropy, confidence, drops.
        coactivation, outputs: 0 where not gathered.
        logit_sample: a full one; less where the data have fewer tokens.
    """

    routing: int
    coactivation: int
    outputs: int
    logit_sample: int

    @property
    def total(self) -> int:
        """Bytes of everything. While a batch is added, twice as much is held."""
        return self.routing + self.coactivation + self.outputs + self.logit_sample

    def __str__(self) -> str:
        return (
            f"{self.total / _MIB:.1f} MiB (routing {self.routing / _MIB:.1f}, co-activation "
            f"{self.coactivation / _MIB:.1f}, outputs {self.outputs / _MIB:.1f}, sampled logits "
            f"{self.logit_sample / _MIB:.1f})"
        )


def held_bytes(model: PreTrainedModel, num_groups: int, parts: StatisticsParts) -> HeldBytes:
    """Return what the statistics of a model will hold; works on the meta device too.

    Raises:
        ModelError: if statistics of the model cannot be gathered.
    """
    return bytes_of_blocks(readable_blocks(model, outputs=parts.outputs), num_groups, parts)


def bytes_of_blocks(blocks: Blocks, num_groups: int, parts: StatisticsParts) -> HeldBytes:
    """Return what the statistics of these blocks will hold."""
    routing = coactivation = outputs = 0
    with torch.device("meta"):
        layers = [LayerStatistics.none(block, side, num_groups, parts) for side, block in blocks]
    for layer in layers:
        pairs = layer.sums.coactivation
        coactivation += 0 if pairs is None else pairs.nbytes
        routing += sum(one.nbytes for one in layer.sums.tensors().values())
        if layer.outputs is not None:
            outputs += sum(one.nbytes for one in layer.outputs.tensors().values())
    # Of each token its number and group, once for a side, and its logits in every layer.
    of_token = 2 * _NUMBER_BYTES * len({side for side, _ in blocks})
    of_token += _LOGIT_BYTES * sum(layer.num_experts for layer in layers)
    return HeldBytes(
        routing=routing - coactivation,
        coactivation=coactivation,
        outputs=outputs,
        logit_sample=parts.logit_sample * of_token,
    )


def bytes_in(statistics: ExpertStatistics) -> int:
    """Return the bytes that statistics hold now, what layers share counted once."""
    tensors = [tensor for layer in statistics.layers for tensor in layer.tensors().values()]
    sampled = {
        layer.side: layer.logit_sample
        for layer in statistics.layers
        if layer.logit_sample is not None
    }
    for sample in sampled.values():
        tensors += [sample.token_numbers, sample.groups]
    return sum(tensor.nbytes for tensor in tensors)
