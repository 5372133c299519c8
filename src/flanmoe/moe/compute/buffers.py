"""Places for what a pass over experts needs for a moment, used again for the next experts."""

import torch
from jaxtyping import Float
from torch import Tensor


class Buffers:
    """Tensors by name, each made once and large enough for the experts with most rows.

    On the CPU, from 32 MiB on, the C library takes a tensor's memory from the kernel and gives it back
    at once, and first touches of its pages cost more than what is written (docs/performance.md).
    Elsewhere the allocator keeps memory itself.

    Args:
        room: the most rows that are asked for.
        like: gives device and dtype.
    """

    def __init__(self, room: int, like: Tensor) -> None:
        self._room = room
        self._like = like
        self._made: dict[str, Tensor] = {}

    def take(
        self, name: str, rows: int, width: int, *, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "N width"]:
        """Return so many rows of the tensor of this name; what they hold means nothing."""
        if name not in self._made:
            size = max(self._room, rows)
            self._made[name] = self._like.new_empty(size, width, dtype=dtype or self._like.dtype)
        return self._made[name][:rows]

    def place(self, name: str, rows: int, width: int) -> Float[Tensor, "N width"] | None:
        """Return the same as a place for a product that some kernels leave unused; None off the CPU."""
        return self.take(name, rows, width) if self._like.device.type == "cpu" else None
