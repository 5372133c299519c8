"""Span corruption: T5's objective (Raffel et al., 2020, arXiv 1910.10683, section 3.1.4).

Spans of the text are left out. In the input a sentinel stands in the place of each; the target is each sentinel
with the span that it stands for. Which spans is drawn as T5's released code does (`random_spans_noise_mask`):
how many tokens and how many spans is rounded from the text's length and never drawn, kept and left-out spans
alternate, the first is kept, the last left out, and all ways to cut both into so many spans are equally likely.
So a text with room for one span only, up to 30 tokens under T5's settings, always loses its end.

The target of the paper's figure ends in one more sentinel, for what is kept after the last span. Here nothing
is kept there, so that sentinel never stands, as in the released code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field

from flanmoe.core.config import Config
from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.denoisers.base import Denoised, DenoisedLengths, denoisers

_SHORTEST_TEXT = 2


class SpanCounts(NamedTuple):
    """How a text is split up.

    Attributes:
        kept: tokens that stay in the input.
        noise: tokens that are left out.
        spans: spans of either kind.
    """

    kept: int
    noise: int
    spans: int


@denoisers.register("span_corruption.v1")
class SpanCorruption(Config):
    """T5's span corruption.

    Attributes:
        noise_density: share of the tokens that is left out.
        mean_span_length: mean length of a span that is left out, in tokens.
    """

    noise_density: float = Field(default=0.15, gt=0, lt=1)
    mean_span_length: float = Field(default=3.0, ge=1)

    def lengths(self, input_length: int) -> DenoisedLengths:
        """Return how long a text is that becomes an input of `input_length` tokens, its end included.

        A text of n tokens has `noise = round(n * noise_density)` and `spans = round(noise / mean_span_length)`,
        its input `n - noise + spans + 1` tokens and its target `noise + spans + 1`. Of several n the largest
        is taken. 512 is 568 tokens of text and 114 of target under T5's settings.

        Raises:
            ConfigError: if no text becomes just that long.
        """
        text = _SHORTEST_TEXT
        while self._inputs(text + 1) <= input_length:
            text += 1
        if self._inputs(text) != input_length:
            raise ConfigError(
                f"No text becomes an input of {input_length} tokens with `noise_density` "
                f"{self.noise_density} and `mean_span_length` {self.mean_span_length}: {text} tokens become "
                f"{self._inputs(text)}, one more {self._inputs(text + 1)}. Take one of these lengths."
            )
        _, noise, spans = self.counts(text)
        return DenoisedLengths(
            text=text, inputs=input_length, targets=noise + spans + 1, sentinels=spans
        )

    def counts(self, num_tokens: int) -> SpanCounts:
        """Return how a text of so many tokens is split up; at least one token is kept and one left out.

        Raises:
            ValueError: if it has fewer than 2 tokens.
        """
        if num_tokens < _SHORTEST_TEXT:
            raise ValueError(f"A text must have at least 2 tokens, but has {num_tokens}.")
        noise = min(max(round(num_tokens * self.noise_density), 1), num_tokens - 1)
        kept = num_tokens - noise
        spans = min(max(round(noise / self.mean_span_length), 1), kept)
        return SpanCounts(kept, noise, spans)

    def __call__(
        self,
        tokens: Int[np.ndarray, " N"],
        sentinels: Sequence[int],
        generator: np.random.Generator,
    ) -> Denoised:
        """Leave out drawn spans of a text; see `Denoiser`.

        Raises:
            DataError: if there are fewer sentinels than spans.
        """
        mask = random_spans(self.counts(len(tokens)), generator)
        return corrupted(tokens, mask, sentinels)

    def _inputs(self, num_tokens: int) -> int:
        kept, _, spans = self.counts(num_tokens)
        return kept + spans + 1


def random_spans(counts: SpanCounts, generator: np.random.Generator) -> Bool[np.ndarray, " N"]:
    """Return True for each token that is left out: spans that alternate, a kept one first."""
    noise = _segment_lengths(counts.noise, counts.spans, generator)
    kept = _segment_lengths(counts.kept, counts.spans, generator)
    lengths = np.stack([kept, noise], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * counts.spans) % 2 == 1, lengths)


def _segment_lengths(
    num_items: int, num_segments: int, generator: np.random.Generator
) -> Int[np.ndarray, " K"]:
    """Return the lengths of K segments, none empty; all ways to cut the items are equally likely."""
    cuts = 1 + generator.choice(num_items - 1, size=num_segments - 1, replace=False)
    return np.diff(np.sort(cuts), prepend=0, append=num_items)


def corrupted(
    tokens: Int[np.ndarray, " N"], mask: Bool[np.ndarray, " N"], sentinels: Sequence[int]
) -> Denoised:
    """Leave out the spans of a text where a mask is True.

    Args:
        tokens: the text; holds no sentinel.
        mask: True for tokens that are left out.
        sentinels: ids of the sentinels in the order in which they are used.

    Raises:
        DataError: if there are fewer sentinels than spans.
    """
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    starts = np.flatnonzero(begins)
    if len(starts) > len(sentinels):
        raise DataError(
            f"Span corruption needs a sentinel for each span that it leaves out, but there are {len(starts)} "
            f"spans and {len(sentinels)} sentinels. Shorten the text, or use a tokenizer with more sentinels."
        )
    used = np.asarray(sentinels[: len(starts)], dtype=tokens.dtype)
    inputs = tokens.copy()
    inputs[starts] = used
    before = np.cumsum(mask) - mask
    return Denoised(
        input_ids=inputs[~mask | begins],
        target_ids=np.insert(tokens[mask], before[starts], used),
    )


def restored(denoised: Denoised, sentinels: Sequence[int]) -> Int[np.ndarray, " N"]:
    """Return the text that was taken apart: the inverse of `corrupted`.

    Raises:
        ValueError: if the sentinels of input and target are not the same, in the same order.
    """
    inputs, targets = denoised
    places, marks = (np.flatnonzero(np.isin(side, sentinels)) for side in denoised)
    if not np.array_equal(inputs[places], targets[marks]) or (len(targets) and 0 not in marks):
        raise ValueError("The sentinels of the target must be those of the input, in their order.")
    spans = np.split(targets, marks)[1:]
    kept = np.split(inputs, places)
    pieces = [kept[0]]
    for span, after in zip(spans, kept[1:], strict=True):
        pieces += [span[1:], after[1:]]
    return np.concatenate(pieces)
