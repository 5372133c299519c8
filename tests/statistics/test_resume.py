"""A pass that was stopped goes on, and ends with the file of one that was not."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flanmoe.core.errors import Interrupted, RunError
from flanmoe.models.blocks import moe_blocks
from flanmoe.statistics import ExpertStatistics, StatisticsBatch, StatisticsParts, collect
from flanmoe.statistics.expert_statistics import read_statistics

from .rows import GROUPS, batches_of, decoder, rows

SCRIPT = Path(__file__).parent / "scripts" / "killed.py"


def collected(
    path: Path | None,
    batches: Iterator[StatisticsBatch] | list[StatisticsBatch] | None = None,
    *,
    data: str = "data",
    seconds: float = 0.0,
) -> ExpertStatistics:
    model = decoder()
    return collect(
        model,
        batches_of(model, rows(8), 1) if batches is None else batches,
        groups=GROUPS,
        data_hash=data,
        parts=StatisticsParts(logit_sample=13),
        path=path,
        seconds_between_saves=seconds,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "statistics"
    collected(path)
    return path.read_bytes()


def stopped(count: int, error: type[BaseException]) -> Iterator[StatisticsBatch]:
    yield from batches_of(decoder(), rows(8), 1)[:count]
    raise error


class Killed(BaseException):
    """Ends a pass without its being asked, as a kill does."""


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_a_pass_that_died_goes_on(count: int, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "statistics"
    with pytest.raises(Killed):
        collected(path, stopped(count, Killed))
    assert read_statistics(path)[1] == count
    collected(path)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "statistics"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "FLANMOE_CHECK_SHAPES": "0"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert read_statistics(path)[1] == 5
    # Nothing half-written stays behind.
    assert [one.name for one in tmp_path.iterdir()] == ["statistics"]
    collected(path)
    assert path.read_bytes() == whole


def test_ctrl_c_saves_even_in_the_middle_of_a_pass(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "statistics"
    model = decoder()
    ran: list[None] = []

    def press(*_: object) -> None:
        ran.append(None)
        if len(ran) == 4:
            signal.raise_signal(signal.SIGINT)

    moe_blocks(model)[1].router.register_forward_hook(press)
    with pytest.raises(Interrupted) as raised:
        collect(
            model,
            batches_of(model, rows(8), 1),
            groups=GROUPS,
            data_hash="data",
            parts=StatisticsParts(logit_sample=13),
            path=path,
            seconds_between_saves=1e9,
        )
    assert str(raised.value) == (
        f"Statistics were stopped after 3 batches, which are in {path}. Collect again with the same file to "
        "go on."
    )
    collected(path)
    assert path.read_bytes() == whole


def test_ctrl_c_without_a_file_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt):
        collected(None, stopped(2, KeyboardInterrupt))


def test_ctrl_c_before_the_first_batch_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path / "statistics", stopped(0, KeyboardInterrupt))
    assert list(tmp_path.iterdir()) == []


def test_saves_are_not_made_with_every_batch(tmp_path: Path) -> None:
    path = tmp_path / "statistics"
    with pytest.raises(Killed):
        collected(path, stopped(8, Killed), seconds=1e9)
    assert not path.exists()


def test_a_finished_pass_is_read_and_not_run(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "statistics"
    path.write_bytes(whole)
    # Nothing asks for a batch.
    found = collected(path, stopped(0, Killed))
    assert found.tokens == {"decoder": sum(len(row.tokens) for row in rows(8))}


def test_the_statistics_of_other_data_are_not_gone_on_with(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "statistics"
    path.write_bytes(whole)
    with pytest.raises(RunError) as raised:
        collected(path, data="other")
    assert str(raised.value) == (
        f"The statistics asked for and those begun in {path} must agree, but differ in data_hash (expected "
        "other, found data). Name another file, remove this one, or collect as before."
    )
    assert path.read_bytes() == whole


@pytest.mark.parametrize("size", [2, 8])
def test_other_batches_are_noticed(size: int, tmp_path: Path) -> None:
    path = tmp_path / "statistics"
    with pytest.raises(Killed):
        collected(path, stopped(3, Killed))
    with pytest.raises(RunError) as raised:
        collected(path, batches_of(decoder(), rows(8), size))
    tokens = sum(len(row.tokens) for row in rows(8)[: min(3 * size, 8)])
    assert str(raised.value) == (
        "A pass must go on with the batches that it began with, but the first 3 held {'decoder': 17} real "
        f"tokens and now hold {{'decoder': {tokens}}}. Make the batches as before, or remove {path} to begin "
        "anew."
    )
