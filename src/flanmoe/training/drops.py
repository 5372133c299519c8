"""What capacity and expert choice leave out: choices that did not fit, and tokens that no expert took."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from flanmoe.moe.routing import Routing


@dataclass(frozen=True, slots=True)
class LayerDrops:
    """What some tokens of one layer went without. Sums of several batches describe them together.

    Attributes:
        counts: choices asked for, those of them that did not fit, real tokens, and those of them that no
            expert took.
    """

    counts: Int[Tensor, "4"]

    @classmethod
    def of(cls, routing: Routing) -> "LayerDrops":
        """Count one layer's routing."""
        served = torch.zeros_like(routing.valid)
        served[routing.token_ids] = True
        counts = (
            routing.choices.asked.sum(),
            routing.num_dropped,
            routing.valid.sum(),
            (routing.valid & ~served).sum(),
        )
        return cls(torch.stack(counts))

    @classmethod
    def none(cls) -> "LayerDrops":
        """Return what no tokens went without."""
        return cls(torch.zeros(4, dtype=torch.long))

    @property
    def dropped_share(self) -> float:
        """Share of the choices asked for that did not fit; 0 where experts choose, since nobody asks."""
        asked, dropped, *_ = self.counts.tolist()
        return dropped / max(asked, 1)

    @property
    def unserved_share(self) -> float:
        """Share of the real tokens that no expert took."""
        *_, tokens, unserved = self.counts.tolist()
        return unserved / max(tokens, 1)

    def __add__(self, other: "LayerDrops") -> "LayerDrops":
        return LayerDrops(self.counts + other.counts)

    def summed(self, over: Callable[[Tensor], Tensor]) -> "LayerDrops":
        """Return the counts added up by `over`, a sum over processes."""
        return LayerDrops(over(self.counts))

    def to_mapping(self) -> dict[str, float]:
        """Return both shares by their names."""
        return {"dropped_share": self.dropped_share, "unserved_share": self.unserved_share}
