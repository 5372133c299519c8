"""One forward pass of a decoder, and only the logits that are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.evaluation.lm.passes import Passes
from flanmoe.evaluation.lm.shared_attention import View, seen_through, sharing


class Forward(Passes):
    """Runs a causal language model without gradients (see `Passes`)."""

    def logits(
        self,
        tokens: Int[Tensor, "B Q"],
        positions: Int[Tensor, "B Q"] | None,
        needed: tuple[Int[Tensor, " N"], Int[Tensor, " N"]],
        view: View | None,
        labels: Int[Tensor, "B Q"] | None = None,
    ) -> Float[Tensor, "N V"]:
        """Return the logits at some places of a batch.

        Args:
            tokens: what is read.
            positions: place of each token in its text, None for the place in its row.
            needed: rows and columns of the places.
            view: what attention sees (the model must be `sharing` then); None for all to the left.
            labels: for the listener: the task of each token, -1 for padding; None for a pass that it is not
                told of.
        """
        options: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        with self.computing(labels), self.only(needed):
            if view is None:
                found = self.model(input_ids=tokens, use_cache=False, **options).logits
            else:
                with seen_through(view):
                    found = self.model(input_ids=tokens, use_cache=False, **options).logits
        return found[0]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Let attention go through views inside the `with` block."""
        with sharing(self.model):
            yield
