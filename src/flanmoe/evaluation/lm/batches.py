"""How many rows go through a model together: by their tokens, and fewer when memory runs out."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from flanmoe.core.console import warn
from flanmoe.core.errors import UserError

# Tokens in one forward pass. On a processor, more of them gain nothing once its cores are busy; an
# accelerator needs many more to be busy.
_TOKENS_ON_CPU = 2048
_TOKENS_ON_ACCELERATOR = 32768
# While text is generated a pass has one token a row and takes the time to read all weights.
_STEPS_ON_CPU = 32
_STEPS_ON_ACCELERATOR = 256
# A batch closes before a row shorter than this share of its longest: on a processor padding costs more
# than a larger batch gains.
_SHORTEST_SHARE = 0.9

_NO_MEMORY = "can't allocate memory"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class BatchSize:
    """Rows in one batch: as many as asked for, or as many as fit a number of tokens.

    Args:
        rows: most rows; None for as many as fit.
        device: `cpu` or an accelerator.
    """

    def __init__(self, rows: int | None, device: torch.device) -> None:
        on_cpu = device.type == "cpu"
        self._rows = rows
        self._tokens = _TOKENS_ON_CPU if on_cpu else _TOKENS_ON_ACCELERATOR
        self._steps = _STEPS_ON_CPU if on_cpu else _STEPS_ON_ACCELERATOR

    def reading(self, longest: int) -> int:
        """Return the most rows of up to `longest` tokens that are read together."""
        fitting = max(self._tokens // max(longest, 1), 1)
        return fitting if self._rows is None else self._rows

    def writing(self) -> int:
        """Return the most rows that are written together."""
        return self._steps if self._rows is None else self._rows

    def halve(self, rows: int) -> None:
        """Take at most half of `rows` from now on: as many ran out of memory.

        Raises:
            UserError: if it was a single row.
        """
        if rows <= 1:
            raise UserError(
                "A batch needs room for one row at least, but memory ran out with one. Free memory, or "
                "evaluate a smaller model."
            )
        self._rows = rows // 2
        warn(f"Memory ran out with {rows} rows in a batch; going on with {self._rows}.")


def in_batches(
    rows: Sequence[_Item],
    *,
    length: Callable[[_Item], int],
    most: Callable[[int], int],
    size: BatchSize,
    run: Callable[[Sequence[_Item]], _Result],
    shortest_share: float = _SHORTEST_SHARE,
) -> Iterator[tuple[list[_Item], _Result]]:
    """Run rows batch by batch; a batch that runs out of memory is tried again at half its size.

    Args:
        rows: longest first.
        length: tokens of a row.
        most: rows at most, given the longest.
        size: is told when memory runs out.
        run: computes one batch.
        shortest_share: no row of a batch is shorter than this share of its longest.
    """
    left = list(rows)
    while left:
        shortest = shortest_share * length(left[0])
        fitting = left[: most(length(left[0]))]
        batch = [row for row in fitting if length(row) >= shortest]
        result = attempt(run, batch, size)
        if result is None:
            continue
        left = left[len(batch) :]
        yield batch, result


def attempt(
    run: Callable[[Sequence[_Item]], _Result], batch: Sequence[_Item], size: BatchSize
) -> _Result | None:
    """Run one batch; None where memory ran out, and batches are half as large from then on."""
    try:
        return run(batch)
    except RuntimeError as error:
        # `torch.OutOfMemoryError` of an accelerator; what the processor's allocator raises has no class of its
        # own.
        if not isinstance(error, torch.OutOfMemoryError) and _NO_MEMORY not in str(error):
            raise
        size.halve(len(batch))
        return None
