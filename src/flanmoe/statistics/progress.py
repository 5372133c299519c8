"""`Progress`: how far a pass has come, in memory and on disk, so that one that was stopped goes on."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from flanmoe.core.errors import DataError, RunError
from flanmoe.models.flan_moe_t5.configuration import Side
from flanmoe.statistics.batches import StatisticsBatch
from flanmoe.statistics.expert_statistics import (
    ExpertStatistics,
    read_statistics,
    require_same,
    write_statistics,
)


class Progress:
    """What was gathered so far, on disk where there is a path.

    Args:
        empty: the statistics over no tokens.
        path: file to go on with and to write; None for memory only.
        seconds: time between two saves.

    Raises:
        RunError: if the file cannot be read, or holds the statistics of something else.
    """

    def __init__(self, empty: ExpertStatistics, path: Path | None, seconds: float) -> None:
        self.path = path
        # One value, so that Ctrl-C finds it as it was or as it will be.
        self._state: tuple[ExpertStatistics, int | None] = (empty, 0)
        self._seconds = seconds
        self._saved = time.monotonic()
        if path is not None and path.exists():
            self._state = read_statistics(path)
            require_same(
                empty,
                self.statistics,
                what=f"The statistics asked for and those begun in {path}",
                way_out="Name another file, remove this one, or collect as before.",
            )

    @property
    def statistics(self) -> ExpertStatistics:
        """The statistics over the first `batches` batches."""
        return self._state[0]

    @property
    def batches(self) -> int | None:
        """Number of batches that were read; None once all were."""
        return self._state[1]

    def checked(self, batches: Iterable[StatisticsBatch]) -> Iterator[StatisticsBatch]:
        """Yield all batches, after a look at whether the first ones are those that were read already.

        Raises:
            DataError: if there are no batches, or none with a real token.
            RunError: if the batches differ from those that were read.
        """
        already, expected = self.batches, self.statistics.tokens
        number, tokens = 0, dict.fromkeys(expected, 0)
        for number, batch in enumerate(batches, start=1):
            for side, count in batch.tokens().items():
                if side in tokens:
                    tokens[side] += count
            if number == already:
                self._require_tokens(expected, tokens)
            yield batch
        if not any(tokens.values()):
            raise DataError(
                "Statistics need at least 1 batch with a token that is not padding, but there is none in "
                f"{number} batches. Give some data."
            )
        if already is not None and number < already:
            self._require_tokens(expected, tokens)

    def add(self, read: ExpertStatistics, *, batches: int) -> None:
        """Take over what one more batch gave, and save where it is time."""
        self._state = (self.statistics + read, batches)
        if self.path is not None and time.monotonic() - self._saved >= self._seconds:
            self.keep()

    def finish(self) -> None:
        """Say that everything has been read, and save."""
        self._state = (self.statistics, None)
        self.keep()

    def keep(self) -> bool:
        """Write what was gathered; False where there is nothing yet, or nowhere to write it."""
        if self.path is None or self.batches == 0:
            return False
        write_statistics(self.path, self.statistics, batches=self.batches)
        self._saved = time.monotonic()
        return True

    def _require_tokens(self, expected: dict[Side, int], found: dict[Side, int]) -> None:
        if expected != found:
            raise RunError(
                f"A pass must go on with the batches that it began with, but the first {self.batches} held "
                f"{expected} real tokens and now hold {found}. Make the batches as before, or remove "
                f"{self.path} to begin anew."
            )
