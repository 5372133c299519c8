"""The gradient that the auxiliary loss leaves in the routers after one step of a trainer."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from flanmoe.models.blocks import moe_blocks
from flanmoe.models.meta import head_weight
from flanmoe.stages.doctor.tiny import tiny_decoder, token_rows
from flanmoe.stages.doctor.trainers import MakeTrainer, TrainingJob

_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Gradients:
    """Norms of two gradients of one step, as the optimizer would get them.

    Attributes:
        router: of all routers, from the auxiliary loss alone.
        head: of the head, from cross-entropy alone.
    """

    router: float
    head: float


class _Listener(TrainerCallback):
    def __init__(self, routers: Sequence[torch.Tensor], head: torch.Tensor) -> None:
        self._routers = routers
        self._head = head
        self.found: Gradients | None = None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Read the gradients of the whole step."""
        router = torch.stack([_gradient(weight).norm() for weight in self._routers]).norm()
        self.found = Gradients(float(router), float(_gradient(self._head).norm()))


def one_step(
    make_trainer: MakeTrainer, *, rows: int, rows_per_batch: int, micro_batches: int
) -> Gradients:
    """Take one step on equal rows with the auxiliary loss on, at coefficient 1.

    Equal rows have the balance of one of them however they are cut, so the cut alone can change the
    gradient. The head is all zeros: cross-entropy then has no gradient below it, and what the routers get
    comes from the auxiliary loss.

    Args:
        make_trainer: returns the trainer that is asked.
        rows: rows to draw from.
        rows_per_batch: rows of one micro-batch on one process.
        micro_batches: micro-batches of the step.

    Raises:
        RuntimeError: if the trainer took no step.
    """
    model = tiny_decoder(output_router_logits=True, router_aux_loss_coef=1.0)
    head = head_weight(model)
    with torch.no_grad():
        head.zero_()
    routers = [block.router.get_parameter("weight") for block in moe_blocks(model)]
    listener = _Listener(routers, head)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=()):
        job = TrainingJob(
            model=model,
            rows=token_rows(1, _LENGTH).tolist() * rows,
            rows_per_batch=rows_per_batch,
            micro_batches=micro_batches,
            steps=1,
            folder=folder,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            callbacks=[listener],
        )
        make_trainer(job).train()
    if listener.found is None:
        raise RuntimeError("The trainer ended without an optimizer step.")
    return listener.found


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
