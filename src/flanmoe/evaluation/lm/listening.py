"""Who listens to the passes of a language model, and what it is told: whose token each one is."""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

PADDING = -1


@runtime_checkable
class Listener(Protocol):
    """Is told of every pass, to record what happens in it."""

    def label(self, task: str) -> int:
        """Return the number by which tokens of this task are named, 0 or more."""
        ...

    def listening(self, labels: Int[Tensor, "B Q"]) -> AbstractContextManager[None]:
        """Return what is open while a pass runs.

        Args:
            labels: for each token of the pass the number of its task, -1 for padding. A token that texts of
                several tasks begin with belongs to the first of them.
        """
        ...
