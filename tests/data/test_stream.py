"""The stream: what it gives is a function of seed and position, and its position is small and exact."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flanmoe.data.row_forms as forms_module
import flanmoe.data.store as store_module
import flanmoe.data.stream as stream_module
from flanmoe.core.errors import DataError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.chat import render_chat
from flanmoe.data.example import Packed, Rendered
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import (
    PackingConfig,
    PackingReport,
    TokenizedExample,
    tokenize,
    tokenize_all,
)
from flanmoe.data.stream import PackedStream

TASKS = ("few", "some", "many")


@cache
def mixture_of(data_dir: Path, seed: int) -> Mixture:
    config = MixtureConfig.parse({"tasks": TASKS})
    return Mixture.load(config, seeds=SeedTree(seed).child("mixture"), data_dir=data_dir)


def stream_of(
    data_dir: Path,
    tokenizer: Any,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **packing: Any,
) -> PackedStream:
    seeds = SeedTree(seed)
    options = {"length": 160, "window": 6, **packing}
    return PackedStream(
        mixture_of(data_dir, seed),
        tokenizer,
        PackingConfig(**options),
        seeds,
        rank=rank,
        world_size=world_size,
    )


def text(row: Packed) -> str:
    return json.dumps(
        [row.input_ids.tolist(), row.labels.tolist(), row.segment_ids.tolist(), list(row.tasks)]
    )


def texts(stream: PackedStream, number: int) -> list[str]:
    return [text(row) for row in islice(stream, number)]


def digest(rows: list[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(
    data_dir: Path, tokenizer: Any
) -> None:
    first = texts(stream_of(data_dir, tokenizer), 30)
    assert first == texts(stream_of(data_dir, tokenizer), 30)
    assert first != texts(stream_of(data_dir, tokenizer, seed=1), 30)
    assert len(set(first)) == 30


@settings(max_examples=15)
@given(
    window=st.integers(1, 20),
    world_size=st.integers(1, 3),
    taken=st.integers(0, 14),
    ahead=st.integers(0, 9),
)
def test_a_restored_stream_goes_on_as_the_uninterrupted_one(
    data_dir: Path, tokenizer: Any, window: int, world_size: int, taken: int, ahead: int
) -> None:
    options = {"window": window, "world_size": world_size, "rank": world_size - 1}
    stream = stream_of(data_dir, tokenizer, **options)
    texts(stream, taken)
    report, drawn = stream.report, stream.seen_hashes
    direct = stream.state_dict()
    texts(stream, ahead)
    after = stream.state_after(taken)
    expected = texts(stream_of(data_dir, tokenizer, **options), taken + 8)[taken:]
    for state in (direct, after):
        restored = stream_of(data_dir, tokenizer, **options)
        restored.load_state_dict(json.loads(json.dumps(state)))
        assert restored.rows_given == taken
        assert restored.report == report
        assert restored.seen_hashes == drawn
        assert texts(restored, 8) == expected
        assert restored.state_after(taken)["rows"] == taken


def test_ranks_share_out_the_rows_of_the_single_stream(data_dir: Path, tokenizer: Any) -> None:
    whole = stream_of(data_dir, tokenizer)
    rows = texts(whole, 24)
    for rank in range(3):
        part = stream_of(data_dir, tokenizer, rank=rank, world_size=3)
        assert texts(part, 8) == rows[rank::3]
        assert part.report == whole.report


def test_every_rank_names_the_tasks_of_all_rows(data_dir: Path, tokenizer: Any) -> None:
    streams = [stream_of(data_dir, tokenizer, rank=rank, world_size=2) for rank in range(2)]
    assert streams[0].task_names == streams[1].task_names
    seen = {task for stream in streams for row in islice(stream, 20) for task in row.tasks}
    assert seen == set(streams[0].task_names)


def test_within_an_epoch_every_example_is_drawn_once(data_dir: Path, tokenizer: Any) -> None:
    stream = stream_of(data_dir, tokenizer, window=1, length=512)
    drawn: dict[str, list[tuple[int, ...]]] = {task: [] for task in TASKS}
    for row in islice(stream, 300):
        drawn[row.tasks[0]].append(tuple(row.input_ids[row.segment_ids == 1].tolist()))
    for task, size in zip(TASKS, (5, 12, 40), strict=True):
        epochs = [drawn[task][i : i + size] for i in range(0, len(drawn[task]), size)]
        assert len(epochs) > 2
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert set(epochs[0]) == set(epochs[1])


def test_the_report_counts_the_rows_that_were_given(data_dir: Path, tokenizer: Any) -> None:
    stream = stream_of(data_dir, tokenizer)
    rows = list(islice(stream, 20))
    counted = PackingReport.of_rows(rows)
    assert stream.report == counted
    examples = Counter(task for row in rows for task in row.tasks)
    assert {name: task.examples for name, task in stream.report.tasks.items()} == examples


def test_dropped_and_truncated_examples_are_counted_by_task(data_dir: Path, tokenizer: Any) -> None:
    dropping = stream_of(data_dir, tokenizer, length=80)
    texts(dropping, 40)
    assert dropping.report.tasks["many"].dropped > 0
    assert dropping.report.tasks.get("few") is not None
    assert dropping.report.tasks["few"].dropped == 0
    cutting = stream_of(data_dir, tokenizer, length=80, on_too_long="truncate")
    texts(cutting, 40)
    assert cutting.report.num_truncated > 0
    assert cutting.report.num_dropped == 0


@settings(max_examples=15)
@given(
    window=st.integers(1, 20),
    length=st.sampled_from([70, 80, 160]),
    taken=st.integers(0, 30),
    ahead=st.integers(0, 9),
)
def test_row_hashes_are_those_of_the_segments_of_the_rows(
    data_dir: Path, tokenizer: Any, window: int, length: int, taken: int, ahead: int
) -> None:
    options = {"window": window, "length": length}
    stream = stream_of(data_dir, tokenizer, **options)
    hashes = hashes_by_tokens(stream.mixture, tokenizer)
    expected = {
        hashes[tuple(row.input_ids[row.segment_ids == segment].tolist())]
        for row in islice(stream, taken)
        for segment in range(1, len(row.tasks) + 1)
    }
    assert stream.row_hashes == expected
    assert stream.row_hashes <= stream.seen_hashes
    texts(stream, ahead)
    state = json.loads(json.dumps(stream.state_after(taken)))
    other = stream_of(data_dir, tokenizer, **options)
    for restored in (stream, other):
        restored.load_state_dict(state)
        assert restored.row_hashes == expected
        assert restored.state_after(taken) == state


def hashes_by_tokens(mixture: Mixture, tokenizer: Any) -> dict[tuple[int, ...], str]:
    return {
        tuple(tokenize(rendered, tokenizer).input_ids.tolist()): rendered.content_hash
        for task in mixture.tasks
        for example in task.examples
        for rendered in [render_chat(example, task.renderer, tokenizer, task.name)]
    }


def test_seen_hashes_hold_what_was_drawn_and_in_the_end_everything(
    data_dir: Path, tokenizer: Any
) -> None:
    stream = stream_of(data_dir, tokenizer, window=1, length=512)
    assert stream.seen_hashes == frozenset()
    texts(stream, 10)
    assert len(stream.seen_hashes) == 10
    everything = {
        example.content_hash() for task in stream.mixture.tasks for example in task.examples
    }
    assert stream.seen_hashes < everything
    texts(stream, 150)
    assert stream.seen_hashes == everything


def test_settings_under_which_nothing_fits_are_an_error(
    data_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_FRUITLESS_DRAWS", 300)
    stream = stream_of(data_dir, tokenizer, length=8, window=100)
    with pytest.raises(DataError) as caught:
        next(stream)
    assert str(caught.value) == (
        "None of the last 300 examples drawn fits in a row of 8 tokens. Raise `packing.length`, or "
        "set `packing.on_too_long` to `truncate`."
    )


def test_a_position_of_another_stream_is_refused(data_dir: Path, tokenizer: Any) -> None:
    state = stream_of(data_dir, tokenizer).state_dict()
    for other in ({"seed": 1}, {"length": 161}, {"world_size": 2}):
        with pytest.raises(RunError, match="belongs to another data stream"):
            stream_of(data_dir, tokenizer, **other).load_state_dict(state)


def test_positions_that_were_not_reached_or_are_gone_are_refused(
    data_dir: Path, tokenizer: Any
) -> None:
    stream = stream_of(data_dir, tokenizer)
    texts(stream, 10)
    with pytest.raises(ValueError, match="between 0 and 10, but is 11"):
        stream.state_after(11)
    state = stream.state_dict()
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match=r"and 10, but is 0"):
        stream.state_after(0)


def test_the_rank_must_be_one_of_the_processes(data_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="between 0 and 1, but is 2"):
        stream_of(data_dir, tokenizer, rank=2, world_size=2)


def test_a_window_is_tokenised_in_one_call(
    data_dir: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def counting(rendered: Sequence[Rendered], given: Any) -> list[TokenizedExample]:
        calls.append(len(rendered))
        return tokenize_all(rendered, given)

    monkeypatch.setattr(forms_module, "tokenize_all", counting)
    stream = stream_of(data_dir, tokenizer, window=20, token_cache=False)
    texts(stream, 15)
    assert calls == [20] * len(calls)
    assert len(calls) == stream.state_dict()["window"] + 1


@pytest.fixture
def stored_mixture(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Mixture]:
    """Load the three tasks from stores on disk."""
    monkeypatch.setenv("FLANMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(store_module, "_MOST_IN_MEMORY", 1)

    def load() -> Mixture:
        config = MixtureConfig.parse({"tasks": TASKS})
        return Mixture.load(config, seeds=SeedTree(0).child("mixture"), data_dir=data_dir)

    return load


def test_examples_on_disk_give_the_rows_of_examples_in_memory(
    data_dir: Path, tokenizer: Any, stored_mixture: Callable[[], Mixture], tmp_path: Path
) -> None:
    in_memory = stream_of(data_dir, tokenizer)
    expected = texts(in_memory, 40)
    for _ in range(2):
        config = PackingConfig(length=160, window=6)
        stream = PackedStream(stored_mixture(), tokenizer, config, SeedTree(0))
        assert texts(stream, 40) == expected
        assert stream.state_dict() == in_memory.state_dict()
        assert stream.row_hashes == in_memory.row_hashes
        assert stream.seen_hashes == in_memory.seen_hashes
    assert len(list(tmp_path.rglob("store.json"))) == 3


def test_hashes_are_looked_up_without_reading_examples(
    tokenizer: Any, stored_mixture: Callable[[], Mixture], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PackingConfig(length=160, window=6)
    stream = PackedStream(stored_mixture(), tokenizer, config, SeedTree(0))
    texts(stream, 40)
    monkeypatch.setattr(store_module, "Example", lambda **_: pytest.fail("an example was read"))
    assert len(stream.seen_hashes) > 20
    assert stream.row_hashes <= stream.seen_hashes


_CONTINUE = """
import hashlib, json, sys
from pathlib import Path
from flanmoe.core.seeds import SeedTree
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig
from flanmoe.data.stream import PackedStream
from flanmoe.testing.tiny_models import tiny_tokenizer

seeds = SeedTree(0)
config = MixtureConfig.parse({"tasks": ["few", "some", "many"]})
mixture = Mixture.load(config, seeds=seeds.child("mixture"), data_dir=Path(sys.argv[1]))
stream = PackedStream(mixture, tiny_tokenizer(), PackingConfig(length=160, window=6), seeds)
stream.load_state_dict(json.loads(sys.argv[2]))
lines = []
for _ in range(20):
    row = next(stream)
    columns = (row.input_ids, row.labels, row.segment_ids)
    lines.append(json.dumps([*(column.tolist() for column in columns), list(row.tasks)]))
print(hashlib.sha256("\\n".join(lines).encode()).hexdigest())
"""


@pytest.mark.slow
def test_a_fresh_process_goes_on_where_this_one_stood(data_dir: Path, tokenizer: Any) -> None:
    stream = stream_of(data_dir, tokenizer)
    texts(stream, 13)
    state = json.dumps(stream.state_after(11))
    finished = subprocess.run(
        [sys.executable, "-c", _CONTINUE, str(data_dir), state],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = texts(stream_of(data_dir, tokenizer), 31)[11:]
    assert finished.stdout.strip() == digest(expected)


def test_a_stream_of_one_example_a_row(data_dir: Path, tokenizer: Any) -> None:
    shared, single = (
        stream_of(data_dir, tokenizer, examples_per_row=number) for number in (None, 1)
    )
    assert (shared.shares_rows, single.shares_rows) == (True, False)
    rows = list(islice(single, 12))
    assert all(len(row.tasks) == 1 for row in rows)
    # The same draws, in rows of their own: a window of 6 gives 6.
    together = [task for row in islice(shared, 12) for task in row.tasks]
    assert Counter(task for row in rows for task in row.tasks) == Counter(together[:12])
    assert single.report.num_examples == single.report.rows == 12


BUDGET = 900


def budgeted_stream(data_dir: Path, tokenizer: Any, *budgets: int) -> PackedStream:
    """A stream of three tasks, of which the last ones have budgets of tokens."""
    limits = [None] * (len(TASKS) - len(budgets)) + list(budgets)
    tasks = [
        {"name": task} | ({"max_tokens": limit} if limit else {})
        for task, limit in zip(TASKS, limits, strict=True)
    ]
    mixture = Mixture.load(
        MixtureConfig.parse({"tasks": tasks}), seeds=SeedTree(0), data_dir=data_dir
    )
    return PackedStream(
        mixture, tokenizer, PackingConfig(length=160, window=4), SeedTree(0).child("stream")
    )


def test_a_task_is_drawn_until_its_budget_of_tokens_is_used_up(
    data_dir: Path, tokenizer: Any
) -> None:
    stream = budgeted_stream(data_dir, tokenizer, BUDGET)
    texts(stream, 200)
    counts = stream.report.tasks
    # Asked between windows: at most one window of four draws goes beyond.
    assert BUDGET <= counts["many"].tokens < BUDGET + 4 * 160
    after = Counter(task for row in islice(stream, 100) for task in row.tasks)
    assert after["many"] == 0
    assert 0.5 < after["few"] / after["some"] / (5 / 12) < 2


def test_a_resumed_stream_remembers_which_budgets_are_used_up(
    data_dir: Path, tokenizer: Any
) -> None:
    stream = budgeted_stream(data_dir, tokenizer, BUDGET)
    for taken in (3, 60):
        texts(stream, taken - stream.rows_given)
        restored = budgeted_stream(data_dir, tokenizer, BUDGET)
        restored.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert (
            texts(restored, 20)
            == texts(budgeted_stream(data_dir, tokenizer, BUDGET), taken + 20)[taken:]
        )


def test_when_every_budget_is_used_up_the_stream_says_so(data_dir: Path, tokenizer: Any) -> None:
    stream = budgeted_stream(data_dir, tokenizer, 100, 100, 100)
    with pytest.raises(DataError) as caught:
        texts(stream, 500)
    assert str(caught.value) == (
        "Every task of the mixture has used up its budget of tokens (`few`, `many`, `some`), and there is more "
        "to train. Raise `max_tokens`, or train for fewer steps."
    )
