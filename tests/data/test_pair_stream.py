"""The stream of an encoder-decoder's rows: the draws of the decoder's stream, as pairs."""

import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flanmoe.data.stream as stream_module
from flanmoe.core.errors import ConfigError, DataError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import PackedPair
from flanmoe.data.mixture import Mixture, MixtureConfig
from flanmoe.data.packing import PackingConfig, PackingReport
from flanmoe.data.row_forms import PairForm
from flanmoe.data.stream import PackedStream
from flanmoe.data.text_to_text import render_text_to_text
from flanmoe.testing.tiny_models import tiny_text_tokenizer

TASKS = ("few", "some", "many")
START = 0


@cache
def mixture_of(data_dir: Path) -> Mixture:
    config = MixtureConfig.parse({"tasks": TASKS})
    return Mixture.load(config, seeds=SeedTree(0).child("mixture"), data_dir=data_dir)


def stream_of(
    data_dir: Path,
    *,
    start: int = START,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **packing: Any,
) -> PackedStream[PackedPair]:
    options = {"length": 80, "target_length": 50, "window": 6, **packing}
    return PackedStream(
        mixture_of(data_dir),
        tiny_text_tokenizer(),
        PackingConfig(**options),
        SeedTree(seed),
        form=PairForm(start),
        rank=rank,
        world_size=world_size,
    )


def text(row: PackedPair) -> str:
    columns = (
        row.input_ids,
        row.segment_ids,
        row.decoder_input_ids,
        row.decoder_segment_ids,
        row.labels,
    )
    return json.dumps([*(column.tolist() for column in columns), list(row.tasks)])


def texts(stream: PackedStream[PackedPair], number: int) -> list[str]:
    return [text(row) for row in islice(stream, number)]


def pairs_in(row: PackedPair) -> list[tuple[str, str, str]]:
    """Task, input and target of each example of a row, as texts."""
    decode = tiny_text_tokenizer().decode
    return [
        (
            task,
            decode(row.input_ids[row.segment_ids == number]),
            decode(row.labels[row.decoder_segment_ids == number]),
        )
        for number, task in enumerate(row.tasks, start=1)
    ]


def written_out(data_dir: Path) -> dict[tuple[str, str, str], str]:
    """The hash of every example, by its task and its two texts with their ends."""
    found: dict[tuple[str, str, str], str] = {}
    for task in mixture_of(data_dir).tasks:
        for example in task.examples:
            one = render_text_to_text(example, task.renderer, task.name, count_tokens=len)
            key = (task.name, f"{one.prompt}</s>", f"{one.response}</s>")
            found[key] = one.content_hash
    return found


def test_rows_hold_the_examples_as_texts_in_and_out(data_dir: Path) -> None:
    expected = written_out(data_dir)
    stream = stream_of(data_dir, examples_per_row=3)
    for taken in range(1, 80):
        row = next(stream)
        found = pairs_in(row)
        assert 1 <= len(found) <= 3
        assert all(key in expected for key in found)
        if taken == 1:
            assert stream.row_hashes == {expected[key] for key in found}
    assert len(stream.row_hashes) > 30


def test_examples_that_fit_are_those_of_the_decoders_stream(data_dir: Path, tokenizer: Any) -> None:
    seeds = SeedTree(0)
    decoder = PackedStream(
        mixture_of(data_dir), tokenizer, PackingConfig(length=512, window=8), seeds
    )
    pairs = stream_of(data_dir, length=300, target_length=200, window=8)
    for stream in (decoder, pairs):
        while stream.state_dict()["window"] < 5:
            next(stream)
    assert pairs.seen_hashes == decoder.seen_hashes
    assert pairs.state_dict()["counts"] == decoder.state_dict()["counts"]


@settings(max_examples=12)
@given(
    window=st.integers(1, 20),
    world_size=st.integers(1, 3),
    taken=st.integers(0, 12),
    ahead=st.integers(0, 7),
)
def test_a_restored_stream_goes_on_as_the_uninterrupted_one(
    data_dir: Path, window: int, world_size: int, taken: int, ahead: int
) -> None:
    options = {"window": window, "world_size": world_size, "rank": world_size - 1}
    stream = stream_of(data_dir, **options)
    texts(stream, taken)
    report, seen, hashes = stream.report, stream.seen_hashes, stream.row_hashes
    texts(stream, ahead)
    state = json.loads(json.dumps(stream.state_after(taken)))
    restored = stream_of(data_dir, **options)
    restored.load_state_dict(state)
    assert (restored.report, restored.seen_hashes, restored.row_hashes) == (report, seen, hashes)
    assert restored.state_after(taken) == state
    assert texts(restored, 8) == texts(stream_of(data_dir, **options), taken + 8)[taken:]


def test_ranks_share_out_the_rows_of_the_single_stream(data_dir: Path) -> None:
    whole = stream_of(data_dir)
    rows = texts(whole, 18)
    for rank in range(3):
        part = stream_of(data_dir, rank=rank, world_size=3)
        assert texts(part, 6) == rows[rank::3]
        assert part.report == whole.report


def test_the_report_counts_both_sides_and_what_does_not_fit(data_dir: Path) -> None:
    stream = stream_of(data_dir, length=30, target_length=12)
    rows = list(islice(stream, 40))
    counted = PackingReport.of_rows(rows)
    report = stream.report
    assert (report.rows, report.real_tokens) == (counted.rows, counted.real_tokens)
    assert report.real_tokens == sum(row.num_real_tokens for row in rows)
    assert report.real_tokens + report.padding_tokens == 40 * (30 + 12)
    assert report.loss_tokens == sum(row.num_loss_tokens for row in rows)
    # An answer of i letters and its end: the 5 of `few` fit, most of the 40 of `many` do not.
    assert report.tasks["many"].dropped > 0
    assert report.tasks["few"].examples > 0
    cutting = stream_of(data_dir, length=30, target_length=12, on_too_long="truncate")
    texts(cutting, 40)
    assert cutting.report.num_truncated > 0
    assert cutting.report.num_dropped == 0


def test_one_example_a_row(data_dir: Path) -> None:
    stream = stream_of(data_dir, examples_per_row=1)
    assert not stream.shares_rows
    assert stream_of(data_dir).shares_rows
    assert all(len(row.tasks) == 1 for row in islice(stream, 20))


def test_positions_of_other_streams_are_refused(data_dir: Path, tokenizer: Any) -> None:
    state = stream_of(data_dir).state_dict()
    others: tuple[dict[str, Any], ...] = ({"start": 5}, {"target_length": 51}, {"seed": 1})
    streams: list[PackedStream[Any]] = [stream_of(data_dir, **other) for other in others]
    packing = PackingConfig(length=80, window=6)
    streams.append(PackedStream(mixture_of(data_dir), tokenizer, packing, SeedTree(0)))
    for stream in streams:
        with pytest.raises(RunError, match="belongs to another data stream"):
            stream.load_state_dict(state)


def test_the_token_cache_has_no_part_in_the_identity(data_dir: Path) -> None:
    states = [stream_of(data_dir, token_cache=kept).state_dict() for kept in (True, False)]
    assert states[0] == states[1]


def test_lengths_must_suit_the_kind_of_rows(data_dir: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"`packing.target_length` must say how many"):
        stream_of(data_dir, target_length=None)
    packing = PackingConfig(length=80, target_length=40)
    with pytest.raises(ConfigError) as caught:
        PackedStream(mixture_of(data_dir), tokenizer, packing, SeedTree(0))
    assert str(caught.value) == (
        "`packing.target_length` has no effect on a decoder, whose rows have one side, but is set to 40. "
        "Take it out."
    )


def test_settings_under_which_nothing_fits_are_an_error(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "_FRUITLESS_DRAWS", 300)
    stream = stream_of(data_dir, length=4, target_length=8, window=100)
    with pytest.raises(DataError) as caught:
        next(stream)
    assert str(caught.value) == (
        "None of the last 300 examples drawn fits in a row of 4 input and 8 target tokens. Raise "
        "`packing.length` or `packing.target_length`, or set `packing.on_too_long` to `truncate`."
    )


def test_real_questions_end_once_on_either_side(real_data_dir: Path) -> None:
    config = MixtureConfig.parse({"tasks": ["copa", "strategyqa"]})
    mixture = Mixture.load(config, seeds=SeedTree(0), data_dir=real_data_dir)
    packing = PackingConfig(length=1024, target_length=512, window=32)
    stream = PackedStream(mixture, tiny_text_tokenizer(), packing, SeedTree(0), form=PairForm(0))
    for row in islice(stream, 5):
        for number in range(1, len(row.tasks) + 1):
            for ids, segments in (
                (row.input_ids, row.segment_ids),
                (row.labels, row.decoder_segment_ids),
            ):
                assert (ids[segments == number] == 1).nonzero()[0].tolist() == [
                    (segments == number).sum() - 1
                ]
