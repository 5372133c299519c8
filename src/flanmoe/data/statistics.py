"""How long rendered examples are, the figures that sum that up, and which examples repeat others."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import numpy as np
from jaxtyping import Int

from flanmoe.data.example import Rendered
from flanmoe.data.packing import tokenize
from flanmoe.data.tokenizer import Tokenizer

# A tokenizer keeps about a hundred bytes for every token of a text, so a very long one goes through in
# pieces.
_LONGEST_AT_ONCE = 200_000
_NUM_MEASURES = 4
_SMALLEST_BIN = 16


@dataclass(frozen=True, slots=True)
class Length:
    """How long one rendered example is. Response tokens are those in the loss."""

    prompt_characters: int
    response_characters: int
    prompt_tokens: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response together."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long N rendered examples are; see `Length`."""

    prompt_characters: Int[np.ndarray, " N"]
    response_characters: Int[np.ndarray, " N"]
    prompt_tokens: Int[np.ndarray, " N"]
    response_tokens: Int[np.ndarray, " N"]

    @classmethod
    def of(cls, lengths: Iterable[Length]) -> "Lengths":
        """Gather single lengths; 32 bytes of each are kept."""
        rows = map(astuple, lengths)
        table = np.fromiter(rows, dtype=np.dtype((np.int64, _NUM_MEASURES)))
        return cls(*table.T)

    @property
    def tokens(self) -> Int[np.ndarray, " N"]:
        """Tokens of prompt and response together."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of several numbers.

    Attributes:
        mean: their mean.
        median: the one in the middle, or the mean of the two.
        p95: the smallest that at least 95 % of them do not exceed.
        maximum: the largest.
    """

    mean: float
    median: float
    p95: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Bin:
    """How many numbers are larger than `above` and at most `at_most`."""

    above: int
    at_most: int
    number: int


def length_of(rendered: Rendered, tokenizer: Tokenizer) -> Length:
    """Measure one rendered example.

    A text of more than 200,000 characters is tokenised in pieces of that length; a token on the border
    of two pieces may then count twice.
    """
    if len(rendered.text) > _LONGEST_AT_ONCE:
        prompt = _num_tokens(rendered.prompt, tokenizer)
        response = _num_tokens(rendered.response, tokenizer)
    else:
        tokens = tokenize(rendered, tokenizer)
        response = int(tokens.loss_mask.sum())
        prompt = len(tokens) - response
    return Length(
        prompt_characters=len(rendered.prompt),
        response_characters=len(rendered.response),
        prompt_tokens=prompt,
        response_tokens=response,
    )


def _num_tokens(text: str, tokenizer: Tokenizer) -> int:
    starts = range(0, len(text), _LONGEST_AT_ONCE)
    pieces = (text[start : start + _LONGEST_AT_ONCE] for start in starts)
    return sum(
        len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        for piece in pieces
    )


def summary(values: Int[np.ndarray, " N"]) -> Summary | None:
    """Sum numbers up; None where there are none."""
    if not len(values):
        return None
    return Summary(
        mean=float(values.mean()),
        median=float(np.median(values)),
        p95=int(np.quantile(values, 0.95, method="inverted_cdf")),
        maximum=int(values.max()),
    )


def histogram(values: Int[np.ndarray, " N"]) -> tuple[Bin, ...]:
    """Count numbers in bins that end at powers of two, from the first to the last that holds one.

    The first bin of all is 0 to 16, 0 included.
    """
    if not len(values):
        return ()
    exponents = np.ceil(np.log2(np.maximum(values, _SMALLEST_BIN))).astype(np.int64)
    first, last = int(exponents.min()), int(exponents.max())
    counts = np.bincount(exponents - first, minlength=last - first + 1)
    return tuple(
        Bin(
            above=2 ** (exponent - 1) if 2**exponent > _SMALLEST_BIN else -1,
            at_most=2**exponent,
            number=int(counts[exponent - first]),
        )
        for exponent in range(first, last + 1)
    )


def repeats(content_hashes: Iterable[str]) -> Int[np.ndarray, "R 2"]:
    """Return the row of every example that repeats an earlier one, and of the first that it repeats.

    Rows ascend. The first 64 bits of the hashes are compared, and 24 bytes for each are held.
    """
    heads = np.fromiter((int(text[:16], 16) for text in content_hashes), dtype=np.uint64)
    order = np.argsort(heads, kind="stable")
    arranged = heads[order]
    repeat = np.zeros(len(heads), dtype=np.bool_)
    repeat[1:] = arranged[1:] == arranged[:-1]
    # The place where the run of equal hashes began that a place belongs to.
    began = np.maximum.accumulate(np.where(repeat, 0, np.arange(len(heads))))
    found = np.column_stack([order[repeat], order[began[repeat]]])
    return found[np.argsort(found[:, 0])]
