"""Passes through a model without gradients, that make only the logits that are asked for."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from flanmoe.core.errors import ModelError
from flanmoe.evaluation.lm.listening import Listener

Precision = Literal["float32", "bfloat16"]
# Rows and columns of places in a batch.
Places = tuple[Int[Tensor, " N"], Int[Tensor, " N"]]

# Logits of one batch: with large vocabularies they need more memory than all else.
MOST_LOGITS = 2**27


class Passes:
    """What all passes through one language model have in common.

    Args:
        model: a language model in evaluation mode.
        precision: `bfloat16` for autocast, `float32` for the type of the weights.
        listener: is told of every pass that has labels, None for nobody.

    Attributes:
        model: the model.
        device: where it is.

    Raises:
        ModelError: if the model does not say which layer makes its logits.
    """

    def __init__(
        self, model: PreTrainedModel, precision: Precision, listener: Listener | None = None
    ) -> None:
        self.model = model
        self.device = model.device
        self._listener = listener
        self._autocast = precision == "bfloat16"
        head: Any = model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"A language model needs a layer that makes logits, but {type(model).__name__} names none "
                "(`get_output_embeddings`). Load it with a head for language modelling."
            )
        self._head = head

    @property
    def vocabulary_size(self) -> int:
        """Logits at one place."""
        return int(self._head.weight.shape[0])

    @contextmanager
    def computing(self, labels: Int[Tensor, "B Q"] | None) -> Iterator[None]:
        """Compute in the precision asked for, without gradients, inside the `with` block.

        Args:
            labels: for the listener: the task of each token of the pass, -1 for padding; None for a pass
                that it is not told of.
        """
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast)
        with torch.no_grad(), autocast, self._listening(labels):
            yield

    @contextmanager
    def only(self, places: Places) -> Iterator[None]:
        """Let the model make logits at some places inside the `with` block, as a batch of one row."""
        rows, columns = places

        def keep(_module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *others = arguments
            return (hidden[rows, columns][None], *others)

        # Whatever a model does to its logits afterwards (scaling, a soft cap) it still does.
        handle = self._head.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _listening(self, labels: Tensor | None) -> AbstractContextManager[None]:
        if self._listener is None or labels is None:
            return nullcontext()
        return self._listener.listening(labels)
