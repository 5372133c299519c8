"""Pairs of texts as rows for an encoder-decoder: tokens, and packing on both sides at once.

Example k of a row is a segment of the encoder's side and one of the decoder's. Rows are filled by best-fit
decreasing in two dimensions (a form of vector packing; Johnson, 1973, is the case of one): the example with
the larger relative size first, each into the row of which it leaves the least.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.example import IGNORED_LABEL, PackedPair, Rendered
from flanmoe.data.packing import (
    Change,
    PackingConfig,
)
from flanmoe.data.tokenizer import Tokenizer, end_of_text_id


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """One rendered example as the tokens of its two texts. M and L tokens.

    Attributes:
        input_ids: what the encoder reads, the end-of-text token last.
        target_ids: what the decoder is to write, the end-of-text token last.
        task, key, content_hash: where it came from.
    """

    input_ids: Int[np.ndarray, " M"]
    target_ids: Int[np.ndarray, " L"]
    task: str
    key: str
    content_hash: str

    @property
    def sizes(self) -> tuple[int, int]:
        """Tokens of the input and of the target."""
        return len(self.input_ids), len(self.target_ids)

    def truncated(self, length: int, target_length: int) -> "TokenizedPair":
        """Return it with at most so many tokens on either side.

        A cut input still ends in its end-of-text token, as every input does. A cut target does not: the
        model is not to learn that the answer ends there.
        """
        inputs = self.input_ids
        if len(inputs) > length:
            inputs = np.append(inputs[: length - 1], inputs[-1])
        return replace(self, input_ids=inputs, target_ids=self.target_ids[:target_length])


def tokenize_pairs(rendered: Sequence[Rendered], tokenizer: Tokenizer) -> list[TokenizedPair]:
    """Encode prompt and response of each as two texts; all go to the tokenizer in one call.

    Both get whatever special tokens the tokenizer puts around a text, and exactly one end-of-text token at
    the end, whether the tokenizer adds it (T5's does) or not.

    Raises:
        DataError: if the tokenizer has no end-of-text token.
    """
    end = end_of_text_id(tokenizer)
    if not rendered:
        return []
    encoding = tokenizer(
        [text for one in rendered for text in (one.prompt, one.response)],
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids = [_ended(tokens, end) for tokens in encoding["input_ids"]]
    return [
        TokenizedPair(
            input_ids=inputs,
            target_ids=targets,
            task=one.task,
            key=one.key,
            content_hash=one.content_hash,
        )
        for one, inputs, targets in zip(rendered, ids[::2], ids[1::2], strict=True)
    ]


def _ended(tokens: Sequence[int], end: int) -> Int[np.ndarray, " N"]:
    kept = len(tokens)
    while kept and tokens[kept - 1] == end:
        kept -= 1
    return np.array([*tokens[:kept], end], dtype=np.int64)


def row_lengths(config: PackingConfig) -> tuple[int, int]:
    """Return the tokens of a row on the encoder's side and on the decoder's.

    Raises:
        ConfigError: if the config sets no length for targets.
    """
    if config.target_length is None:
        raise ConfigError(
            "`packing.target_length` must say how many tokens a row of an encoder-decoder has on the decoder's "
            f"side, but is null. Set it; `packing.length` ({config.length}) is that of the encoder's side."
        )
    return config.length, config.target_length


def fitted_pair(
    pair: TokenizedPair, config: PackingConfig
) -> tuple[TokenizedPair | None, Change | None]:
    """Return what of a pair goes into a row, and what was done to it.

    Raises:
        DataError: if it is too long, when the config asks for an error.
        ConfigError: if the config sets no length for targets.
    """
    lengths = row_lengths(config)
    inputs, targets = pair.sizes
    if inputs <= lengths[0] and targets <= lengths[1]:
        return pair, None
    if config.on_too_long == "error":
        raise DataError(
            f"Example `{pair.key}` of task `{pair.task}` must have at most {lengths[0]} input tokens "
            f"(`packing.length`) and {lengths[1]} target tokens (`packing.target_length`), but has {inputs} "
            f"and {targets}. Raise them, or set `packing.on_too_long` to `drop` or `truncate`."
        )
    if config.on_too_long == "truncate":
        return pair.truncated(*lengths), "truncated"
    return None, "dropped"


def assign_pair_rows(
    sizes: Sequence[tuple[int, int]],
    *,
    capacities: tuple[int, int],
    most_in_a_row: int | None = None,
) -> list[list[int]]:
    """Best-fit decreasing in two dimensions: return the indices that share each row.

    The relative size of a side is its tokens over the row's. The pair whose larger one is largest goes first,
    equal ones in the order given; each goes into a row with enough space on both sides, of these into the
    one where the relative spaces left add up to the least, the oldest of several. A row that holds
    `most_in_a_row` is closed. Indices within a row ascend, and rows are ordered by their first index.

    Raises:
        ValueError: if a size is not between 1 and its capacity.
    """
    for pair in sizes:
        for size, capacity in zip(pair, capacities, strict=True):
            if not 1 <= size <= capacity:
                raise ValueError(f"A length must be between 1 and {capacity}, but is {size}.")
    # Relative sizes with one denominator, so that they compare exactly.
    weights = np.array(capacities[::-1], dtype=np.int64)
    needed = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    spaces = np.zeros_like(needed)
    rows: list[list[int]] = []
    for index in np.argsort(-(needed * weights).max(axis=1, initial=0), kind="stable").tolist():
        left = spaces[: len(rows)] - needed[index]
        places = np.flatnonzero((left >= 0).all(axis=1))
        if len(places):
            row = int(places[(left[places] @ weights).argmin()])
        else:
            row = len(rows)
            rows.append([])
            spaces[row] = capacities
        rows[row].append(index)
        spaces[row] -= needed[index]
        if len(rows[row]) == most_in_a_row:
            spaces[row] = 0
    return sorted(sorted(row) for row in rows)


def grouped_pairs(
    pairs: Sequence[TokenizedPair],
    *,
    length: int,
    target_length: int,
    most_in_a_row: int | None = None,
) -> list[list[TokenizedPair]]:
    """Return the pairs that share each row; see `assign_pair_rows`."""
    rows = assign_pair_rows(
        [pair.sizes for pair in pairs],
        capacities=(length, target_length),
        most_in_a_row=most_in_a_row,
    )
    return [[pairs[index] for index in row] for row in rows]


def packed_pair_row(
    pairs: Sequence[TokenizedPair],
    *,
    length: int,
    target_length: int,
    decoder_start_token_id: int,
    padding: int = 0,
) -> PackedPair:
    """Write one row: the pairs in order as segments 1, 2, ... of both sides, then padding as segment 0."""
    input_ids, segment_ids = _side([pair.input_ids for pair in pairs], length, padding)
    given = [np.append(decoder_start_token_id, pair.target_ids[:-1]) for pair in pairs]
    decoder_input_ids, decoder_segment_ids = _side(given, target_length, padding)
    labels, _ = _side([pair.target_ids for pair in pairs], target_length, IGNORED_LABEL)
    return PackedPair(
        input_ids=input_ids,
        segment_ids=segment_ids,
        decoder_input_ids=decoder_input_ids,
        decoder_segment_ids=decoder_segment_ids,
        labels=labels,
        tasks=tuple(pair.task for pair in pairs),
    )


def _side(
    segments: Sequence[Int[np.ndarray, " _"]], length: int, filling: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Return segments side by side, filled up, and the number of each position's segment."""
    values = np.full(length, filling, dtype=np.int64)
    numbers = np.zeros(length, dtype=np.int64)
    start = 0
    for number, segment in enumerate(segments, start=1):
        stop = start + len(segment)
        values[start:stop] = segment
        numbers[start:stop] = number
        start = stop
    return values, numbers
