"""How long requests will take: what they make a model compute, and how fast it does, tried out."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

_ROWS, _LENGTH = 4, 128
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Load:
    """What requests make a model compute.

    Attributes:
        tokens: tokens that are read.
        steps: passes that write one token in each row of a batch, if no answer ends early.
        rows: rows in the largest of those batches.
    """

    tokens: int
    steps: int = 0
    rows: int = 0


def expected_seconds(load: Load, run: Callable[[int, int], None]) -> float:
    """Return about how long a load takes, at most: answers that end early save time.

    Tries a few passes, which takes a second or so on a small model.

    Args:
        load: what is computed.
        run: makes one pass over some rows of some length; its arguments.
    """
    reading = _seconds(run, _ROWS, _LENGTH) / (_ROWS * _LENGTH)
    writing = _seconds(run, load.rows, 1) if load.steps else 0.0
    return load.tokens * reading + load.steps * writing


def _seconds(run: Callable[[int, int], None], rows: int, length: int) -> float:
    run(rows, length)  # the first one of a shape compiles kernels
    taken: list[float] = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run(rows, length)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
