"""Packing: token sequences of several examples side by side in rows of one length.

Every example is a segment. Its positions restart at 0, and no attention mask is made: most native
transformers decoders read the restarts and keep segments apart (without a cache); which ones do not
is found by `flanmoe.models.packing`. Rows are filled by best-fit decreasing (Johnson, 1973): the
longest example first, each into the row that it fills best.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field

from flanmoe.core.config import Config
from flanmoe.core.errors import DataError
from flanmoe.data.example import IGNORED_LABEL, Packed, PackedPair, Rendered
from flanmoe.data.tokenizer import Tokenizer


class PackingConfig(Config):
    """How token sequences become rows.

    Attributes:
        length: tokens in a row; for an encoder-decoder those of the encoder's side.
        target_length: tokens of the decoder's side of an encoder-decoder's row. None for decoders, whose
            rows have one side.
        window: how many draws are packed together. More of them leave less padding; fewer keep the
            order of the draws.
        on_too_long: what happens to an example with more tokens than a row: `drop` and count it,
            `truncate` its end and count it (dropped where nothing of the response would be left),
            or stop with an `error`. Of an encoder-decoder's pair each side is cut to its own length.
        examples_per_row: how many examples may share a row; None for as many as fit. With 1 nothing
            is packed, which every decoder can be trained with and which leaves much padding.
        token_cache: keep the tokens of every text in the cache folder; see `flanmoe.data.token_cache`.
            Of decoders only: pairs of texts are tokenised each time.
    """

    length: int = Field(default=1024, ge=2)
    target_length: int | None = Field(default=None, ge=2)
    window: int = Field(default=512, ge=1)
    on_too_long: Literal["drop", "truncate", "error"] = "drop"
    examples_per_row: int | None = Field(default=None, ge=1)
    token_cache: bool = True


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One rendered example as tokens. L tokens.

    Attributes:
        input_ids: token ids of prompt and response.
        loss_mask: True for tokens that the model is to predict; never the first token, which has
            nothing before it.
        task, key, content_hash: where it came from.
    """

    input_ids: Int[np.ndarray, " L"]
    loss_mask: Bool[np.ndarray, " L"]
    task: str
    key: str
    content_hash: str

    def __len__(self) -> int:
        return len(self.input_ids)

    def truncated(self, length: int) -> "TokenizedExample":
        """Return the first `length` tokens of it."""
        return replace(self, input_ids=self.input_ids[:length], loss_mask=self.loss_mask[:length])


class TaskCounts(Config):
    """What became of the draws of one task.

    Attributes:
        examples: examples that stand in a row, truncated ones included.
        tokens: their tokens; of an encoder-decoder those of both sides.
        dropped: examples left out because they do not fit in a row.
        truncated: examples whose end was cut off.
        without_exemplars: few-shot samples left out because not one exemplar fits before them.
    """

    examples: int = 0
    tokens: int = 0
    dropped: int = 0
    truncated: int = 0
    without_exemplars: int = 0

    def __add__(self, other: "TaskCounts") -> "TaskCounts":
        return TaskCounts(
            examples=self.examples + other.examples,
            tokens=self.tokens + other.tokens,
            dropped=self.dropped + other.dropped,
            truncated=self.truncated + other.truncated,
            without_exemplars=self.without_exemplars + other.without_exemplars,
        )


class PackingReport(Config):
    """What packing made of its examples. `+` merges reports.

    Attributes:
        rows: packed rows.
        real_tokens: tokens that belong to an example; of an encoder-decoder those of both sides.
        padding_tokens: tokens that fill up rows, on either side.
        loss_tokens: tokens whose prediction enters the loss.
        tasks: counts by task name.
    """

    rows: int = 0
    real_tokens: int = 0
    padding_tokens: int = 0
    loss_tokens: int = 0
    tasks: dict[str, TaskCounts] = Field(default_factory=dict[str, TaskCounts])

    @property
    def padding_share(self) -> float:
        """Padding over all tokens; 0 where there are none."""
        total = self.real_tokens + self.padding_tokens
        return self.padding_tokens / total if total else 0.0

    @property
    def num_examples(self) -> int:
        """Examples that stand in a row."""
        return sum(counts.examples for counts in self.tasks.values())

    @property
    def num_dropped(self) -> int:
        """Examples left out because they do not fit in a row."""
        return sum(counts.dropped for counts in self.tasks.values())

    @property
    def num_truncated(self) -> int:
        """Examples whose end was cut off."""
        return sum(counts.truncated for counts in self.tasks.values())

    @property
    def num_without_exemplars(self) -> int:
        """Few-shot samples left out because not one exemplar fits before them."""
        return sum(counts.without_exemplars for counts in self.tasks.values())

    @classmethod
    def of_rows(cls, rows: Iterable[Packed | PackedPair]) -> "PackingReport":
        """Count packed rows."""
        tally = PackingTally()
        for row in rows:
            tally.add_row(row)
        return tally.report()

    def __add__(self, other: "PackingReport") -> "PackingReport":
        tasks = dict(self.tasks)
        for name, counts in other.tasks.items():
            tasks[name] = tasks.get(name, TaskCounts()) + counts
        return PackingReport(
            rows=self.rows + other.rows,
            real_tokens=self.real_tokens + other.real_tokens,
            padding_tokens=self.padding_tokens + other.padding_tokens,
            loss_tokens=self.loss_tokens + other.loss_tokens,
            tasks=tasks,
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return the counts as plain JSON types, with `padding_share` and the totals over tasks."""
        return {
            **self.model_dump(mode="json"),
            "padding_share": self.padding_share,
            "examples": self.num_examples,
            "dropped": self.num_dropped,
            "truncated": self.num_truncated,
            "without_exemplars": self.num_without_exemplars,
        }


Change = Literal["dropped", "truncated", "without_exemplars"]


class PackingTally:
    """A packing report that grows in place, for counting row by row.

    Args:
        report: what it starts with.
    """

    def __init__(self, report: PackingReport | None = None) -> None:
        begun = report or PackingReport()
        self._rows = begun.rows
        self._real_tokens = begun.real_tokens
        self._padding_tokens = begun.padding_tokens
        self._loss_tokens = begun.loss_tokens
        self._tasks = {name: counts.model_dump() for name, counts in begun.tasks.items()}

    def add_row(self, row: Packed | PackedPair) -> None:
        """Count a packed row."""
        padding, *sizes = row.segment_sizes
        self._rows += 1
        self._padding_tokens += padding
        self._real_tokens += sum(sizes)
        self._loss_tokens += row.num_loss_tokens
        for task, tokens in zip(row.tasks, sizes, strict=True):
            counts = self._counts_of(task)
            counts["examples"] += 1
            counts["tokens"] += tokens

    def add_change(self, task: str, change: Change) -> None:
        """Count an example that was left out or cut."""
        self._counts_of(task)[change] += 1

    def tokens_of(self, task: str) -> int:
        """Return the tokens of a task's examples so far."""
        return self._tasks.get(task, {}).get("tokens", 0)

    def report(self) -> PackingReport:
        """Return the counts so far."""
        return PackingReport(
            rows=self._rows,
            real_tokens=self._real_tokens,
            padding_tokens=self._padding_tokens,
            loss_tokens=self._loss_tokens,
            tasks={name: TaskCounts(**counts) for name, counts in self._tasks.items()},
        )

    def copy(self) -> "PackingTally":
        """Return a tally of its own with the same counts."""
        other = copy(self)
        other._tasks = {name: dict(counts) for name, counts in self._tasks.items()}
        return other

    def _counts_of(self, task: str) -> dict[str, int]:
        return self._tasks.setdefault(task, dict.fromkeys(TaskCounts.model_fields, 0))


def tokenize(rendered: Rendered, tokenizer: Tokenizer) -> TokenizedExample:
    """Tokenize one rendered example; see `tokenize_all`."""
    return tokenize_all([rendered], tokenizer)[0]


def tokenize_all(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> list[TokenizedExample]:
    """Encode prompt and response of each as one text; the loss mask follows the loss spans.

    All texts go to the tokenizer in one call: fast tokenizers share them out among the cores. A token
    enters the loss when all of its characters lie in a loss span. One that straddles the border between
    prompt and response belongs to the prompt: the model is given it.

    Raises:
        DataError: if the tokenizer gives no character offsets.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "Packing needs a fast tokenizer (one that gives character offsets), but "
            f"{type(tokenizer).__name__} is a slow one. Load it with `use_fast=True`."
        )
    if not rendered:
        return []
    encoding = tokenizer(
        [one.text for one in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        TokenizedExample(
            input_ids=np.array(input_ids, dtype=np.int64),
            loss_mask=_loss_mask(offsets, one.loss_spans),
            task=one.task,
            key=one.key,
            content_hash=one.content_hash,
        )
        for one, input_ids, offsets in zip(
            rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True
        )
    ]


def _loss_mask(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> Bool[np.ndarray, " L"]:
    bounds = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)
    starts, ends = bounds[:, 0], bounds[:, 1]
    reached = np.zeros_like(ends)
    np.maximum.accumulate(ends[:-1], out=reached[1:])
    # Byte-level tokenizers leave the space before a word out of its offsets; it belongs to the token.
    firsts = np.minimum(starts, reached)
    mask = np.zeros(len(offsets), dtype=np.bool_)
    for begin, stop in spans:
        mask |= (begin <= firsts) & (ends <= stop)
    mask[:1] = False
    return mask


def fit(
    examples: Iterable[TokenizedExample], config: PackingConfig
) -> tuple[list[TokenizedExample], PackingReport]:
    """Return the examples that fit in a row, and a report of what was dropped or truncated.

    Raises:
        DataError: for the first example that is too long, when the config asks for an error.
    """
    kept: list[TokenizedExample] = []
    tally = PackingTally()
    for example in examples:
        fitting, change = fitted(example, config)
        if fitting is not None:
            kept.append(fitting)
        if change is not None:
            tally.add_change(example.task, change)
    return kept, tally.report()


def fitted(
    example: TokenizedExample, config: PackingConfig
) -> tuple[TokenizedExample | None, Change | None]:
    """Return what of an example goes into a row, and what was done to it; see `fit`."""
    if len(example) <= config.length:
        return example, None
    if config.on_too_long == "error":
        raise DataError(
            f"Example `{example.key}` of task `{example.task}` must have at most {config.length} "
            f"tokens (`packing.length`), but has {len(example)}. Raise `packing.length`, or set "
            "`packing.on_too_long` to `drop` or `truncate`."
        )
    cut = example.truncated(config.length)
    if config.on_too_long == "truncate" and cut.loss_mask.any():
        return cut, "truncated"
    return None, "dropped"


def assign_rows(
    lengths: Sequence[int], *, capacity: int, most_in_a_row: int | None = None
) -> list[list[int]]:
    """Best-fit decreasing: return the indices that share each row.

    Longest first, equal lengths in the order given; each goes into the row with the least space
    that is still enough, the oldest of several such rows. A row that holds `most_in_a_row` is
    closed. Indices within a row ascend, and rows are ordered by their first index.

    Raises:
        ValueError: if a length is not between 1 and `capacity`.
    """
    for length in lengths:
        if not 1 <= length <= capacity:
            raise ValueError(f"A length must be between 1 and {capacity}, but is {length}.")
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[index]
        place = bisect_left(spaces, (length, -1))
        if place == len(spaces):
            space, row = capacity, len(rows)
            rows.append([])
        else:
            space, row = spaces.pop(place)
        rows[row].append(index)
        if len(rows[row]) != most_in_a_row:
            insort(spaces, (space - length, row))
    return sorted(sorted(row) for row in rows)


def pack(
    examples: Sequence[TokenizedExample],
    *,
    length: int,
    padding: int = 0,
    most_in_a_row: int | None = None,
) -> list[Packed]:
    """Put examples into as few rows of `length` tokens as best-fit decreasing finds.

    Args:
        examples: none longer than `length` (see `fit`).
        length: tokens in a row.
        padding: the token id that fills up rows.
        most_in_a_row: how many examples may share a row; None for as many as fit.

    Raises:
        ValueError: if an example is empty or longer than `length`.
    """
    rows = grouped(examples, length=length, most_in_a_row=most_in_a_row)
    return [packed_row(row, length=length, padding=padding) for row in rows]


def grouped(
    examples: Sequence[TokenizedExample], *, length: int, most_in_a_row: int | None = None
) -> list[list[TokenizedExample]]:
    """Return the examples that share each row of `length` tokens; see `assign_rows`."""
    lengths = [len(example) for example in examples]
    rows = assign_rows(lengths, capacity=length, most_in_a_row=most_in_a_row)
    return [[examples[index] for index in row] for row in rows]


def packed_row(examples: Sequence[TokenizedExample], *, length: int, padding: int = 0) -> Packed:
    """Write one row: the examples in order as segments 1, 2, ..., then padding as segment 0."""
    input_ids = np.full(length, padding, dtype=np.int64)
    labels = np.full(length, IGNORED_LABEL, dtype=np.int64)
    segment_ids = np.zeros(length, dtype=np.int64)
    position_ids = np.zeros(length, dtype=np.int64)
    start = 0
    for segment, example in enumerate(examples, start=1):
        stop = start + len(example)
        input_ids[start:stop] = example.input_ids
        labels[start:stop] = np.where(example.loss_mask, example.input_ids, IGNORED_LABEL)
        # Unshifted labels are compared with the prediction made one token earlier: for the first
        # token of a segment that would be the last token of the segment before.
        labels[start] = IGNORED_LABEL
        segment_ids[start:stop] = segment
        position_ids[start:stop] = np.arange(stop - start)
        start = stop
    position_ids[start:] = np.arange(length - start)
    return Packed(
        input_ids=input_ids,
        labels=labels,
        segment_ids=segment_ids,
        position_ids=position_ids,
        tasks=tuple(example.task for example in examples),
    )


def merged(reports: Iterable[PackingReport]) -> PackingReport:
    """Add up reports."""
    total = PackingReport()
    for report in reports:
        total = total + report
    return total


def report_from_state(state: Mapping[str, Any]) -> PackingReport:
    """Read back what `PackingReport.model_dump` wrote."""
    return PackingReport.model_validate(dict(state))
