"""Denoising rows: every epoch's text against a written-out one, positions, ranks, and no padding."""

import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from flanmoe.core.errors import ConfigError, DataError, RunError
from flanmoe.core.seeds import SeedTree
from flanmoe.data.denoised_stream import DenoisedStream, DenoisingConfig
from flanmoe.data.denoisers import Denoised, SpanCorruption, sentinel_ids
from flanmoe.data.denoisers.span_corruption import restored
from flanmoe.data.documents import Document, DocumentsConfig, load_documents
from flanmoe.data.example import PackedPair
from flanmoe.data.packing import PackingReport
from flanmoe.data.tokenizer_training import TokenizerTrainingConfig, train_tokenizer
from flanmoe.training.rows import RowStream

NUM_WORDS, NUM_SENTINELS = 400, 17
FIRST_WORD = 3
END, START = 1, 7
# The sizes of the documents; together 390 words, each of which stands once.
SIZES = (1, 40, 7, 90, 2, 3, 120, 60, 1, 66)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token a word, `</s>` behind a text, sentinels at the end in T5's order."""
    names = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(NUM_WORDS))]
    names += [f"<extra_id_{number}>" for number in reversed(range(NUM_SENTINELS))]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def documents() -> list[Document]:
    bounds = np.cumsum([0, *SIZES]).tolist()
    return [
        Document.of(" ".join(f"w{number}" for number in range(begin, end)), f"document {begin}")
        for begin, end in pairwise(bounds)
    ]


def stream_of(
    words: Any,
    *,
    texts: list[Document] | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    start: int = START,
    **config: Any,
) -> DenoisedStream:
    return DenoisedStream(
        documents() if texts is None else texts,
        words,
        DenoisingConfig(**{"length": 40, **config}),
        SeedTree(seed).child("stream"),
        sentinels=sentinel_ids(words),
        decoder_start_token_id=start,
        rank=rank,
        world_size=world_size,
    )


def text(row: PackedPair) -> str:
    columns = (row.input_ids, row.decoder_input_ids, row.labels)
    return json.dumps([column.tolist() for column in columns])


def window_of(row: PackedPair, sentinels: tuple[int, ...]) -> list[int]:
    """The text that a row was made from."""
    assert row.input_ids[-1] == row.labels[-1] == END
    return restored(Denoised(row.input_ids[:-1], row.labels[:-1]), sentinels).tolist()


def windows_written_out(epoch: int, length: int) -> list[list[int]]:
    """All documents in the epoch's order, an end behind each, cut up and shuffled."""
    seeds = SeedTree(0).child("stream").child("epoch", epoch)
    ids: list[list[int]] = []
    for document in documents():
        ids.append([int(word[1:]) + FIRST_WORD for word in document.text.split()] + [END])
    order = seeds.child("documents").numpy().permutation(len(ids))
    together = [token for number in order for token in ids[number]]
    number = len(together) // length
    windows = [together[i * length : (i + 1) * length] for i in range(number)]
    return [windows[place] for place in seeds.child("windows").numpy().permutation(number)]


@pytest.mark.parametrize("length", [4, 40, 90, 300])
def test_rows_are_the_windows_of_the_epochs_text(words: Any, length: int) -> None:
    """Windows shorter than most documents, and longer than any."""
    stream = stream_of(words, length=length)
    assert isinstance(stream, RowStream)
    assert stream.lengths == SpanCorruption().lengths(length)
    sentinels = sentinel_ids(words)
    for epoch in range(3):
        expected = windows_written_out(epoch, stream.lengths.text)
        assert len(expected) == stream.rows_per_epoch >= 1
        rows = islice(stream, stream.rows_per_epoch)
        assert [window_of(row, sentinels) for row in rows] == expected
        assert stream.epochs == epoch + 1


def test_within_an_epoch_no_word_is_read_twice_and_epochs_differ(words: Any) -> None:
    stream = stream_of(words)
    epochs: list[list[int]] = []
    for _ in range(2):
        windows = [
            window_of(row, sentinel_ids(words)) for row in islice(stream, stream.rows_per_epoch)
        ]
        read = [token for window in windows for token in window if token != END]
        assert len(set(read)) == len(read)
        # Less than a window of the 400 tokens is left over.
        assert sum(map(len, windows)) > 400 - stream.lengths.text
        epochs.append(read)
    assert epochs[0] != epochs[1]


def test_other_spans_are_left_out_of_the_same_text_in_another_epoch(words: Any) -> None:
    whole = [Document.of(" ".join(f"w{number}" for number in range(65)), "all")]
    stream = stream_of(words, texts=whole, length=60)
    assert stream.rows_per_epoch == 1
    assert stream.lengths.text == 66
    rows = list(islice(stream, 12))
    assert len({tuple(window_of(row, sentinel_ids(words))) for row in rows}) == 1
    assert len({text(row) for row in rows}) > 6


def test_a_row_has_no_padding_and_aligned_labels(words: Any) -> None:
    stream = stream_of(words)
    assert not stream.shares_rows
    assert stream.task_names == next(iter(stream)).tasks == ("span_corruption",)
    for row in islice(stream, 30):
        assert len(row.input_ids) == 40
        assert len(row.labels) == stream.lengths.targets
        assert row.segment_ids.tolist() == [1] * 40
        assert row.decoder_segment_ids.tolist() == [1] * stream.lengths.targets
        assert row.decoder_input_ids.tolist() == [START, *row.labels[:-1].tolist()]
        assert row.labels[0] == sentinel_ids(words)[0]
        assert row.tasks == ("span_corruption",)


def test_the_report_is_that_of_the_rows(words: Any) -> None:
    stream = stream_of(words)
    assert stream.report == PackingReport()
    assert stream.report == PackingReport.of_rows([])
    rows = list(islice(stream, 17))
    assert stream.report == PackingReport.of_rows(rows)
    assert stream.report.padding_share == 0
    assert stream.epochs == pytest.approx(17 / stream.rows_per_epoch)


@settings(max_examples=12)
@given(taken=st.integers(0, 25), ahead=st.integers(0, 15), world_size=st.integers(1, 3))
def test_a_restored_stream_goes_on_as_the_uninterrupted_one(
    words: Any, taken: int, ahead: int, world_size: int
) -> None:
    options = {"rank": world_size - 1, "world_size": world_size}
    stream = stream_of(words, **options)
    for _ in range(taken + ahead):
        next(stream)
    state = stream.state_after(taken)
    assert len(json.dumps(state)) < 100
    restored_stream = stream_of(words, **options)
    restored_stream.load_state_dict(json.loads(json.dumps(state)))
    assert restored_stream.state_dict() == state
    expected = [text(row) for row in islice(stream_of(words, **options), taken + 10)][taken:]
    assert [text(row) for row in islice(restored_stream, 10)] == expected
    stream.load_state_dict(state)
    assert [text(row) for row in islice(stream, 10)] == expected


def test_ranks_share_out_the_rows_of_the_single_stream(words: Any) -> None:
    whole = stream_of(words)
    rows = [text(row) for row in islice(whole, 60)]
    assert len(set(rows)) == 60
    for rank in range(3):
        part = stream_of(words, rank=rank, world_size=3)
        assert [text(row) for row in islice(part, 20)] == rows[rank::3]
        assert (part.report, part.epochs) == (whole.report, whole.epochs)


def test_documents_count_as_seen_from_the_first_row_on(words: Any) -> None:
    stream = stream_of(words)
    assert stream.seen_hashes == frozenset()
    next(stream)
    assert stream.seen_hashes == {document.content_hash for document in documents()}


def test_positions_of_other_streams_are_refused(words: Any) -> None:
    state = stream_of(words).state_dict()
    stream_of(words).load_state_dict(state)
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"length": 25},
        {"world_size": 2},
        {"start": 0},
        {"texts": documents()[::-1]},
        {"options": {"mean_span_length": 2.0}},
    ]
    for other in others:
        with pytest.raises(RunError, match="belongs to another data stream"):
            stream_of(words, **other).load_state_dict(state)


def test_positions_not_reached_and_ranks_there_are_not_are_refused(words: Any) -> None:
    stream = stream_of(words)
    next(stream)
    with pytest.raises(ValueError, match="between 0 and 1, but is 2"):
        stream.state_after(2)
    with pytest.raises(ValueError, match="between 0 and 1, but is 2"):
        stream_of(words, rank=2, world_size=2)


def test_too_little_text_is_refused(words: Any) -> None:
    with pytest.raises(DataError) as caught:
        # 1 + 40 words and their ends.
        stream_of(words, texts=documents()[:2], length=60)
    assert str(caught.value) == (
        "The documents must hold at least 66 tokens, from which one row of 60 is made, but hold 43. Add "
        "documents, or lower `length`."
    )


def test_sentinels_in_a_text_and_too_few_of_them_are_refused(words: Any) -> None:
    marked = [*documents(), Document.of("w1 <extra_id_2> w2", "marked")]
    with pytest.raises(DataError, match=r"must hold no sentinels, .* but hold 1"):
        stream_of(words, texts=marked)
    with pytest.raises(DataError, match="need 19 sentinels, but the tokenizer has 17"):
        stream_of(words, length=350)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"denoiser": "span_coruption"}, "Did you mean `span_corruption`"),
        ({"options": {"noise_densty": 0.1}}, "Did you mean `noise_density`"),
        (
            {"length": 4, "options": {"noise_density": 0.5, "mean_span_length": 1}},
            "No text becomes an input of 4 tokens",
        ),
    ],
)
def test_a_config_that_makes_no_rows_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        DenoisingConfig.parse(values)


def test_real_text_is_restored(real_data_dir: Path, tmp_path: Path) -> None:
    chosen = DocumentsConfig.parse(
        {"sources": [{"name": "web_text", "split": "c4"}], "held_out_share": 0.2}
    )
    train, held_out = (
        load_documents(chosen, part=part, data_dir=real_data_dir) for part in ("train", "held_out")
    )
    trained = train_tokenizer(train[:100], TokenizerTrainingConfig(vocabulary_size=1024))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained.backend, **trained.settings)
    sentinels = sentinel_ids(tokenizer)
    stream = DenoisedStream(
        held_out,
        tokenizer,
        DenoisingConfig(length=128),
        SeedTree(0),
        sentinels=sentinels,
        decoder_start_token_id=0,
    )
    everything = "".join(document.text for document in held_out)
    for row in islice(stream, stream.rows_per_epoch):
        pieces = tokenizer.decode(window_of(row, sentinels)).split("</s>")
        # The first and the last piece may begin or end within a character.
        assert all(piece.strip("\ufffd") in everything for piece in pieces)
