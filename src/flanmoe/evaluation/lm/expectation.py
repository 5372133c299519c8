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
        before: mean number of kept tokens before a row of them, which they attend to as well.
        steps: passes that write one token in each row of a batch, if no answer ends early.
        context: mean number of tokens before a row that is written.
        rows: rows in the largest of those batches.
    """

    tokens: int
    before: float = 0.0
    steps: int = 0
    context: float = 0.0
    rows: int = 0

    def __add__(self, other: "Load") -> "Load":
        tokens, steps = self.tokens + other.tokens, self.steps + other.steps
        before = self.tokens * self.before + other.tokens * other.before
        context = self.steps * self.context + other.steps * other.context
        return Load(
            tokens=tokens,
            before=before / max(tokens, 1),
            steps=steps,
            context=context / max(steps, 1),
            rows=max(self.rows, other.rows),
        )


def expected_seconds(load: Load, run: Callable[[int, int, int], None]) -> float:
    """Return about how long a load takes, at most: answers that end early save time.

    Tries a few passes, which takes a few seconds on a small model.

    Args:
        load: what is computed.
        run: makes one pass; its arguments are the rows, their length, and the kept tokens before each.
    """
    reading = _seconds(run, _ROWS, _LENGTH, round(load.before)) / (_ROWS * _LENGTH)
    writing = _seconds(run, load.rows, 1, round(load.context)) if load.steps else 0.0
    return load.tokens * reading + load.steps * writing


def _seconds(run: Callable[[int, int, int], None], rows: int, length: int, before: int) -> float:
    run(rows, length, before)  # the first one of a shape compiles kernels, and fills what is kept
    taken: list[float] = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run(rows, length, before)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
