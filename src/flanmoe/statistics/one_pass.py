"""One forward pass of a batch, and what every sparse layer did in it."""

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.models.flan_moe_t5.configuration import Side
from flanmoe.moe.compute import ExpertOutputs, observed_outputs
from flanmoe.moe.recorder import RoutingRecorder
from flanmoe.moe.routing import Routing
from flanmoe.moe.routing_sums import RoutingSums
from flanmoe.statistics.batches import StatisticsBatch
from flanmoe.statistics.expert_statistics import ExpertStatistics
from flanmoe.statistics.layer_statistics import LayerStatistics
from flanmoe.statistics.logit_sample import Candidates
from flanmoe.statistics.output_sums import OutputSums
from flanmoe.statistics.readable import Blocks


class OnePass:
    """Runs a model on batches and reads every sparse layer.

    Args:
        model: the model, in evaluation mode.
        blocks: its sparse blocks with their sides.
        empty: the statistics over no tokens.
    """

    def __init__(self, model: PreTrainedModel, blocks: Blocks, empty: ExpertStatistics) -> None:
        self._model = model
        self._blocks = blocks
        self._empty = empty
        self._options: dict[str, Any] = {"use_cache": False}
        # Logits over the vocabulary are of no use here, and in small models a good part of the work.
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1

    @torch.no_grad()
    def read(
        self, batch: StatisticsBatch, candidates: Mapping[Side, Candidates]
    ) -> ExpertStatistics:
        """Run a batch and return the statistics over its tokens.

        Args:
            batch: a batch that was checked.
            candidates: by side, the tokens whose logits are kept; none where no sample is.

        Raises:
            ModelError: if logits or outputs are not finite, or experts see other tokens than their router.
        """
        device = self._model.device
        sides = self._empty.tokens
        valid: dict[Side, Tensor] = {side: batch.valid[side].to(device) for side in sides}
        groups: dict[Side, Tensor] = {side: batch.groups[side].to(device) for side in sides}
        inputs = {name: values.to(device) for name, values in batch.inputs.items()}
        with self._observing(valid, groups) as outputs, self._recording(valid) as routings:
            self._model(**{**self._options, **inputs})
        given = {side: iter(own) for side, own in routings.items()}
        layers = tuple(
            self._layer(layer, next(given[layer.side]), groups[layer.side], shown, candidates)
            for layer, shown in zip(self._empty.layers, outputs, strict=True)
        )
        tokens = {side: int(batch.valid[side].sum()) for side in sides}
        return replace(self._empty, layers=layers, tokens=tokens)

    def _layer(
        self,
        empty: LayerStatistics,
        routing: Routing,
        groups: Tensor,
        shown: Sequence[OutputSums],
        candidates: Mapping[Side, Candidates],
    ) -> LayerStatistics:
        sums = RoutingSums.of(
            routing,
            groups,
            num_groups=len(self._empty.groups),
            coactivation=empty.sums.coactivation is not None,
        ).changed(Tensor.cpu)
        chosen = candidates.get(empty.side)
        return replace(
            empty,
            sums=sums,
            outputs=None if empty.outputs is None else _checked(empty, sums, shown),
            logit_sample=None if chosen is None else chosen.sample(routing.logits),
        )

    @contextmanager
    def _recording(self, valid: Mapping[Side, Tensor]) -> Generator[dict[Side, list[Routing]]]:
        """Record the routing of each side, whose routers see tokens of their own."""
        with ExitStack() as stack:
            yield {
                side: stack.enter_context(
                    RoutingRecorder([block for of, block in self._blocks if of == side]).recording(
                        valid=valid[side]
                    )
                )
                for side in self._empty.tokens
            }

    @contextmanager
    def _observing(
        self, valid: Mapping[Side, Tensor], groups: Mapping[Side, Tensor]
    ) -> Generator[list[list[OutputSums]]]:
        """Add up what each layer's experts return as soon as they do, so that no output is kept."""
        found: list[list[OutputSums]] = [[] for _ in self._blocks]
        with ExitStack() as stack:
            for (side, block), layer, own in zip(
                self._blocks, self._empty.layers, found, strict=True
            ):
                if layer.outputs is not None:
                    add = self._adding(own, valid[side], groups[side], block.num_experts)
                    stack.enter_context(observed_outputs(block.experts, add))
            yield found

    def _adding(
        self, found: list[OutputSums], valid: Tensor, groups: Tensor, num_experts: int
    ) -> Callable[[ExpertOutputs], None]:
        def add(shown: ExpertOutputs) -> None:
            found.append(
                OutputSums.of(
                    shown,
                    valid,
                    groups,
                    num_groups=len(self._empty.groups),
                    num_experts=num_experts,
                )
            )

        return add


def _checked(layer: LayerStatistics, sums: RoutingSums, shown: Sequence[OutputSums]) -> OutputSums:
    """Return the sums of a layer's outputs if its experts ran once, for the tokens that its router sent."""
    if len(shown) != 1 or not torch.equal(shown[0].counts.cpu(), sums.assignments):
        raise ModelError(
            f"What the experts of {layer.name} return can be read where they run once in a pass, for the "
            f"tokens that their router sends to them, but ran {len(shown)} times or for others. Leave outputs "
            "out with `StatisticsParts(outputs=False)`."
        )
    outputs = shown[0].cpu()
    if not outputs.outputs.isfinite().all():
        broken = (~outputs.outputs.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        raise ModelError(
            f"Outputs of experts must be finite, but those of experts {broken} of {layer.name} hold NaN or "
            "infinity. Compute in a wider type, or go back to the last checkpoint."
        )
    return outputs
