"""Counting where the tokens of an evaluation go, in the passes that it makes anyway."""

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.evaluation.lm.listening import PADDING
from flanmoe.evaluation.routing.counts import HALVES, RoutingCounts
from flanmoe.evaluation.routing.router_outputs import joined, router_outputs
from flanmoe.models.blocks import moe_blocks
from flanmoe.moe.block import MoEBlock
from flanmoe.moe.routing import require_finite_logits

# Outputs of routers are kept until there are so many tokens: a pass over texts is counted at once, steps of
# generation some dozens together.
_TOKENS_TOGETHER = 2048


@final
class RoutingListener:
    """Counts assignments by task and expert in every pass of a language model (a `Listener`).

    What a pass is told of as padding is left out. A pass that fails counts nothing.

    Args:
        model: a sparse decoder.

    Raises:
        ModelError: if the model is dense or an encoder-decoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(
                f"Expert load is recorded in decoders, but {type(model).__name__} is an encoder-decoder. Leave "
                "`--routing` out."
            )
        self._blocks = moe_blocks(model)
        if not self._blocks:
            raise ModelError(
                f"Recording which experts are used needs a sparse model, but {type(model).__name__} has no "
                "experts. Leave `--routing` out, or make the model sparse first with `flanmoe upcycle`."
            )
        self._waiting: list[tuple[Tensor, list[Any]]] = []
        self._num_waiting = 0
        self._tasks: dict[str, int] = {}
        self._halves = random.Random(0)
        empty = torch.zeros(0, dtype=torch.long)
        self._tokens: Tensor = empty
        self._assignments: list[Tensor] = [empty for _ in self._blocks]

    def label(self, task: str) -> int:
        """Return the number of a task and of the half that the next of its requests falls into."""
        number = self._tasks.setdefault(task, len(self._tasks))
        return HALVES * number + self._halves.randrange(HALVES)

    @contextmanager
    def listening(self, labels: Int[Tensor, "B Q"]) -> Generator[None]:
        """Count the pass that is made inside the `with` block.

        Args:
            labels: for each token what `label` returned for its request, -1 for padding.

        Raises:
            ModelError: if a router does not run exactly once, or its logits are no numbers.
        """
        with router_outputs(self._blocks) as outputs:
            yield
        self._waiting.append((labels.flatten(), outputs))
        self._num_waiting += labels.numel()
        if self._num_waiting >= _TOKENS_TOGETHER:
            self._count()

    def counts(self) -> RoutingCounts:
        """Return what was counted so far, by task in the order in which tasks were met.

        Raises:
            ModelError: if a router's logits are no numbers.
        """
        self._count()
        num_labels = HALVES * len(self._tasks)
        return RoutingCounts(
            names=tuple(self._tasks),
            layers=tuple(block.layer for block in self._blocks),
            top_k=tuple(block.top_k for block in self._blocks),
            tokens=_table(self._tokens, num_labels).reshape(-1, HALVES),
            assignments=tuple(
                _table(counts, num_labels * block.num_experts).reshape(
                    -1, HALVES, block.num_experts
                )
                for counts, block in zip(self._assignments, self._blocks, strict=True)
            ),
        )

    def _count(self) -> None:
        """Count the passes that wait for it, each layer in one piece."""
        if not self._waiting:
            return
        labels = [flat for flat, _ in self._waiting]
        outputs = [returned for _, returned in self._waiting]
        self._waiting, self._num_waiting = [], 0
        self._tokens = _sum(self._tokens, _counted(torch.cat(labels), len(self._tasks)))
        for place, block in enumerate(self._blocks):
            for flat, returned in joined(labels, [one[place] for one in outputs]):
                self._assignments[place] = _sum(
                    self._assignments[place], self._assigned(block, flat, returned)
                )

    def _assigned(
        self, block: MoEBlock, labels: Int[Tensor, " T"], returned: Any
    ) -> Int[Tensor, " _"]:
        routing = block.routing(returned)
        require_finite_logits(
            routing.logits, labels != PADDING, router=f"the router of {block.name}"
        )
        # Cells of one label lie together, so that a task met later only makes the list longer. Padding has the
        # label -1; its cells are the first, and go.
        cells = (labels[routing.token_ids] + 1) * block.num_experts + routing.expert_ids
        size = (HALVES * len(self._tasks) + 1) * block.num_experts
        return torch.bincount(cells, minlength=size)[block.num_experts :]


def _counted(labels: Int[Tensor, " T"], num_tasks: int) -> Int[Tensor, " _"]:
    return torch.bincount(labels + 1, minlength=HALVES * num_tasks + 1)[1:]


def _sum(total: Int[Tensor, " _"], new: Int[Tensor, " _"]) -> Int[Tensor, " _"]:
    """Return the sum of counts; the total is shorter where it is from before a task was met."""
    new[: len(total)] += total.to(new.device)
    return new


def _table(counts: Int[Tensor, " _"], size: int) -> Int[np.ndarray, " _"]:
    table = np.zeros(size, dtype=np.int64)
    table[: len(counts)] = counts.cpu().numpy()
    return table
