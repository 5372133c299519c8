"""Collects statistics and is killed before the sixth batch."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rows import GROUPS, batches_of, decoder, rows

from flanmoe.statistics import StatisticsBatch, StatisticsParts, collect


def killed() -> Iterator[StatisticsBatch]:
    """Five batches, and then the end."""
    yield from batches_of(decoder(), rows(8), 1)[:5]
    os.kill(os.getpid(), signal.SIGKILL)


collect(
    decoder(),
    killed(),
    groups=GROUPS,
    data_hash="data",
    parts=StatisticsParts(logit_sample=13),
    path=Path(sys.argv[1]),
    seconds_between_saves=0.0,
)
