"""Rows of words of examples, as 64-bit hashes.

Words are folded: lower case, punctuation removed, split at white space.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
from jaxtyping import Bool, Int, UInt64

from flanmoe.data.example import Example

# What is folded and hashed at a time; characters bound the memory where examples are long.
_BATCH_EXAMPLES = 1024
_BATCH_CHARACTERS = 2**20
_PUNCTUATION = re.compile(r"[^\w\s]|_")

# Odd, so that it has an inverse modulo 2**64.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)


def folded_words(text: str) -> list[str]:
    """Return the words of a text in lower case, punctuation removed."""
    return _PUNCTUATION.sub("", text.casefold()).split()


def words_of(example: Example) -> list[str]:
    """Return the folded words of what an example asks and then of what it answers."""
    return folded_words(f"{example.inputs} {example.target}")


@dataclass(frozen=True, slots=True)
class HashedExamples:
    """The hashes of R examples.

    Attributes:
        exact: the head of each content hash.
        grams: of every row of words, one example after the other.
        gram_rows: the example that each of them stands in.
        is_short: whether an example has fewer words than such a row; it then has one, of all its
            words, or none where it has no word.
    """

    exact: UInt64[np.ndarray, " R"]
    grams: UInt64[np.ndarray, " G"]
    gram_rows: Int[np.ndarray, " G"]
    is_short: Bool[np.ndarray, " R"]

    @classmethod
    def of(cls, examples: Sequence[Example], num_words: int) -> "HashedExamples":
        """Fold and hash a batch."""
        exact = [int(example.content_hash()[:16], 16) for example in examples]
        words = [words_of(example) for example in examples]
        sizes = np.asarray([len(part) for part in words], dtype=np.int64)
        lengths = np.minimum(sizes, num_words)
        num_grams = np.where(sizes > 0, sizes - lengths + 1, 0)
        rows = np.repeat(np.arange(len(examples)), num_grams)
        first = ranges(np.cumsum(sizes) - sizes, num_grams)
        hashes = np.fromiter(
            map(_word_hash, chain.from_iterable(words)), dtype=np.uint64, count=int(sizes.sum())
        )
        return cls(
            exact=np.asarray(exact, dtype=np.uint64),
            grams=_rolled(hashes, first, first + lengths[rows]),
            gram_rows=rows,
            is_short=sizes < num_words,
        )

    @classmethod
    def joined(cls, parts: Sequence["HashedExamples"]) -> "HashedExamples":
        """Put batches one behind the other."""
        empty = cls.of((), 1)
        return cls(
            exact=np.concatenate([empty.exact, *(part.exact for part in parts)]),
            grams=np.concatenate([empty.grams, *(part.grams for part in parts)]),
            gram_rows=np.concatenate([empty.gram_rows, *(part.gram_rows for part in parts)]),
            is_short=np.concatenate([empty.is_short, *(part.is_short for part in parts)]),
        )

    def moved(self, by: int) -> "HashedExamples":
        """Return the same with examples numbered from `by`."""
        return HashedExamples(self.exact, self.grams, self.gram_rows + by, self.is_short)


def ranges(first: Int[np.ndarray, " N"], sizes: Int[np.ndarray, " N"]) -> Int[np.ndarray, " S"]:
    """Return first[0], first[0] + 1, ... of as many as sizes[0] says, then the same for the next."""
    before = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(first - before, sizes)


def _rolled(
    hashes: UInt64[np.ndarray, " W"],
    first: Int[np.ndarray, " G"],
    stop: Int[np.ndarray, " G"],
) -> UInt64[np.ndarray, " G"]:
    """Hash rows of words: sum over i of hashes[first + i] * base**i, modulo 2**64.

    Read off running sums: the difference of two, times the inverse of base**first.
    """
    powers = _powers(_BASE, len(hashes) + 1)
    sums = np.zeros(len(hashes) + 1, dtype=np.uint64)
    np.cumsum(hashes * powers[:-1], out=sums[1:])
    return (sums[stop] - sums[first]) * _powers(_INVERSE, len(hashes) + 1)[first]


def _powers(base: int, number: int) -> UInt64[np.ndarray, " P"]:
    """Return base**0, base**1, ..., modulo 2**64."""
    factors = np.full(number, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


@lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    # Random over 64 bits, so that sums of products are; Python's own changes with every process.
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Yield examples in lists that are small enough to be hashed at once."""
    batch: list[Example] = []
    characters = 0
    for example in examples:
        batch.append(example)
        characters += len(example.inputs) + len(example.target)
        if len(batch) >= _BATCH_EXAMPLES or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
