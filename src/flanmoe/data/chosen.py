"""Some rows of a sequence, as a sequence: nothing is copied."""

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import numpy as np
from jaxtyping import Int

_Item = TypeVar("_Item")


class Chosen(Sequence[_Item]):
    """The items of a sequence that stand in chosen rows.

    Args:
        items: the whole sequence.
        rows: positions in it, in the order wanted.
    """

    def __init__(self, items: Sequence[_Item], rows: Int[np.ndarray, " N"]) -> None:
        self._items = items
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> _Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_Item]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Chosen(self._items, self._rows[index])
        return self._items[int(self._rows[index])]
