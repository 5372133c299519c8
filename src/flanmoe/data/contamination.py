"""Overlap of training text with evaluation text.

An evaluated example is contaminated by a training example under one of three rules, the strictest that
holds:

- `exact`: they ask and answer the same (equal content hashes);
- `whole`: it has fewer than 13 words, and they are all the words of the training example, in order;
- `ngram`: it has at least 13 words, and some 13 of them in a row stand in the training example
  (Brown et al., 2020, appendix C).

The text is what the content hash is taken of, the question and then the answer; options that are kept
apart from the question do not count. Words are folded: lower case, punctuation removed, split at white
space. A language that is written without spaces has long "words", so for it only near copies are found.

Rows of words are compared by 64-bit hashes, so two different ones are taken for the same with a
probability of about (rows in training) x (rows in evaluation) / 2**64.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt64

from flanmoe.data.example import Example
from flanmoe.data.word_rows import HashedExamples, batches, ranges, words_of

NUM_WORDS = 13

Rule = Literal["exact", "whole", "ngram"]

# Stricter rules have larger codes; 0 is no overlap.
_NGRAM, _WHOLE, _EXACT = 1, 2, 3
_RULES: dict[int, Rule] = {_NGRAM: "ngram", _WHOLE: "whole", _EXACT: "exact"}


@dataclass(frozen=True, slots=True)
class RuleCounts:
    """How many examples overlap, each counted under the strictest rule that holds for it."""

    exact: int = 0
    whole: int = 0
    ngram: int = 0

    @property
    def total(self) -> int:
        """Examples that overlap under any rule."""
        return self.exact + self.whole + self.ngram


@dataclass(frozen=True, slots=True)
class SharedText:
    """One overlap, to look at.

    Attributes:
        training_key: key of the training example.
        evaluated_key: key of an evaluated example that it overlaps with.
        rule: the strictest rule that holds.
        text: folded words in a row that both have, 13 of them where there are as many.
    """

    training_key: str
    evaluated_key: str
    rule: Rule
    text: str


@dataclass(frozen=True, slots=True)
class PairOverlap:
    """What a training task and an evaluated task share.

    Attributes:
        training_task: name of the task trained on.
        evaluated_task: name of the task scored on.
        training: training examples that overlap with some evaluated example of the other task.
        evaluated: evaluated examples that overlap with some training example of the other task.
        shown: a few of the overlaps.
    """

    training_task: str
    evaluated_task: str
    training: RuleCounts
    evaluated: RuleCounts
    shown: tuple[SharedText, ...]


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """What training shares with evaluation.

    Attributes:
        pairs: pairs of tasks that share something, in the order of the tasks.
        training: for each training task, the examples that overlap with any evaluated task.
        evaluated: for each evaluated task, the examples that overlap with any training task.
        training_sizes: examples of each training task.
        evaluated_sizes: examples of each evaluated task.
    """

    pairs: tuple[PairOverlap, ...]
    training: dict[str, RuleCounts]
    evaluated: dict[str, RuleCounts]
    training_sizes: dict[str, int]
    evaluated_sizes: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Lists:
    """Several short lists of numbers in two arrays: list i is `values[offsets[i] : offsets[i + 1]]`."""

    offsets: Int[np.ndarray, " O"]
    values: Int[np.ndarray, " V"]

    def joined(
        self, chosen: Int[np.ndarray, " C"]
    ) -> tuple[Int[np.ndarray, " J"], Int[np.ndarray, " C"]]:
        """Return the values of the chosen lists one behind the other, and how many each has."""
        first = self.offsets[chosen]
        sizes = self.offsets[chosen + 1] - first
        return self.values[ranges(first, sizes)], sizes


@dataclass(frozen=True, slots=True)
class _Table:
    """The distinct hashes of evaluated examples, ascending, and for each who has it.

    Attributes:
        hashes: H of them.
        examples: numbers of the evaluated examples that have a hash.
        tasks: numbers of their tasks.
    """

    hashes: UInt64[np.ndarray, " H"]
    examples: _Lists
    tasks: _Lists

    def places(self, hashes: UInt64[np.ndarray, " Q"]) -> Int[np.ndarray, " Q"]:
        """Return where each hash stands in the table, -1 where it does not."""
        if not len(self.hashes):
            return np.full(len(hashes), -1, dtype=np.int64)
        found = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[found] == hashes, found, -1)

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        lists = (self.examples, self.tasks)
        return self.hashes.nbytes + sum(part.offsets.nbytes + part.values.nbytes for part in lists)


@dataclass(frozen=True, slots=True)
class EvaluationIndex:
    """Hashes of what is evaluated on, to be asked for training examples. E examples.

    Build it with `of`.

    Attributes:
        tasks: names of the evaluated tasks.
        keys: keys of the examples, task by task.
        num_words: words in a row that make an overlap.
        task_of: number of the task of each example.
        is_short: whether an example has fewer words than that.
        exact: content hashes, and who has them.
        grams: hashes of rows of words, and who has them.
    """

    tasks: tuple[str, ...]
    keys: tuple[str, ...]
    num_words: int
    task_of: Int[np.ndarray, " E"]
    is_short: Bool[np.ndarray, " E"]
    exact: _Table
    grams: _Table

    @classmethod
    def of(
        cls, tasks: Mapping[str, Iterable[Example]], *, num_words: int = NUM_WORDS
    ) -> "EvaluationIndex":
        """Read the evaluated examples once.

        Args:
            tasks: examples by the name of their task.
            num_words: words in a row that make an overlap.

        Raises:
            ValueError: if `num_words` is not positive.
        """
        if num_words < 1:
            raise ValueError(f"`num_words` must be at least 1, but is {num_words}.")
        keys: list[str] = []
        task_of: list[int] = []
        parts: list[HashedExamples] = []
        for number, examples in enumerate(tasks.values()):
            for batch in batches(examples):
                parts.append(HashedExamples.of(batch, num_words).moved(len(keys)))
                keys += [example.key for example in batch]
                task_of += [number] * len(batch)
        hashed = HashedExamples.joined(parts)
        owners = np.asarray(task_of, dtype=np.int64)
        return cls(
            tasks=tuple(tasks),
            keys=tuple(keys),
            num_words=num_words,
            task_of=owners,
            is_short=hashed.is_short,
            exact=_table(hashed.exact, np.arange(len(keys)), owners),
            grams=_table(hashed.grams, hashed.gram_rows, owners),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the hashes and of who has them; the keys come on top.

        For each distinct row of words 24 bytes, and 8 for each example and each task that has it.
        """
        own = self.task_of.nbytes + self.is_short.nbytes
        return own + self.exact.num_bytes + self.grams.num_bytes

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each evaluated task."""
        counts = np.bincount(self.task_of, minlength=len(self.tasks))
        return dict(zip(self.tasks, counts.tolist(), strict=True))


def overlaps(
    training: Mapping[str, Iterable[Example]], index: EvaluationIndex, *, most_shown: int = 3
) -> OverlapReport:
    """Compare training examples with what is evaluated on; they are read once, as a stream.

    Args:
        training: examples by the name of their task.
        index: what is evaluated on.
        most_shown: overlaps that are shown of each pair of tasks.
    """
    pairs: list[PairOverlap] = []
    counts: dict[str, RuleCounts] = {}
    sizes: dict[str, int] = {}
    evaluated = np.zeros(len(index.keys), dtype=np.uint8)
    for name, examples in training.items():
        task = _TrainingTask(name, index, most_shown)
        for batch in batches(examples):
            task.add(batch)
        pairs += task.pairs()
        counts[name] = task.counts
        sizes[name] = task.size
        evaluated = np.maximum(evaluated, task.evaluated())
    return OverlapReport(
        pairs=tuple(pairs),
        training=counts,
        evaluated=_counts_by_task(evaluated, index),
        training_sizes=sizes,
        evaluated_sizes=index.sizes,
    )


def overlapping_rows(examples: Iterable[Example], index: EvaluationIndex) -> Int[np.ndarray, " R"]:
    """Return the row numbers, ascending, of the training examples that overlap under any rule."""
    rows: list[Int[np.ndarray, " B"]] = []
    first = 0
    for batch in batches(examples):
        rows.append(first + np.flatnonzero(_Found.of(batch, index).rules(index).any(axis=1)))
        first += len(batch)
    return np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Found:
    """What of a batch of R training examples stands in an index.

    Attributes:
        exact_rows, exact_places: examples, and the places of their content hashes.
        gram_rows, gram_places: examples, and the places of their rows of words.
        is_short: as in `HashedExamples`.
    """

    exact_rows: Int[np.ndarray, " X"]
    exact_places: Int[np.ndarray, " X"]
    gram_rows: Int[np.ndarray, " F"]
    gram_places: Int[np.ndarray, " F"]
    is_short: Bool[np.ndarray, " R"]

    @classmethod
    def of(cls, examples: Sequence[Example], index: EvaluationIndex) -> "_Found":
        """Look a batch up."""
        hashed = HashedExamples.of(examples, index.num_words)
        exact = index.exact.places(hashed.exact)
        grams = index.grams.places(hashed.grams)
        return cls(
            exact_rows=np.flatnonzero(exact >= 0),
            exact_places=exact[exact >= 0],
            gram_rows=hashed.gram_rows[grams >= 0],
            gram_places=grams[grams >= 0],
            is_short=hashed.is_short,
        )

    def rules(self, index: EvaluationIndex) -> UInt8[np.ndarray, "R T"]:
        """Return the code of the strictest rule for every example and evaluated task."""
        codes = np.zeros((len(self.is_short), len(index.tasks)), dtype=np.uint8)
        tasks, sizes = index.grams.tasks.joined(self.gram_places)
        rows = np.repeat(self.gram_rows, sizes)
        codes[rows, tasks] = np.where(self.is_short[rows], _WHOLE, _NGRAM)
        tasks, sizes = index.exact.tasks.joined(self.exact_places)
        codes[np.repeat(self.exact_rows, sizes), tasks] = _EXACT
        return codes


class _TrainingTask:
    """Counts what one training task shares with each evaluated task, batch by batch."""

    def __init__(self, name: str, index: EvaluationIndex, most_shown: int) -> None:
        self.size = 0
        self._name = name
        self._index = index
        self._most_shown = most_shown
        self._shown: dict[int, list[SharedText]] = {}
        # One row a rule, one column an evaluated task, and last of all any of them.
        self._counts = np.zeros((_EXACT + 1, len(index.tasks) + 1), dtype=np.int64)
        self._exact_seen = np.zeros(len(index.exact.hashes), dtype=np.bool_)
        self._grams_seen = np.zeros(len(index.grams.hashes), dtype=np.bool_)

    def add(self, batch: Sequence[Example]) -> None:
        """Compare one batch."""
        self.size += len(batch)
        found = _Found.of(batch, self._index)
        if not len(found.exact_places) and not len(found.gram_places):
            return
        self._exact_seen[found.exact_places] = True
        self._grams_seen[found.gram_places] = True
        codes = found.rules(self._index)
        codes = np.column_stack([codes, codes.max(axis=1)])
        for code in _RULES:
            self._counts[code] += (codes == code).sum(axis=0)
        self._show(batch, codes[:, :-1])

    def _show(self, batch: Sequence[Example], codes: UInt8[np.ndarray, "R T"]) -> None:
        for task in np.flatnonzero(codes.any(axis=0)).tolist():
            shown = self._shown.setdefault(task, [])
            rows: list[int] = np.flatnonzero(codes[:, task]).tolist()
            for row in rows[: self._most_shown - len(shown)]:
                shown.append(_shared(batch[row], task, int(codes[row, task]), self._index))

    @property
    def counts(self) -> RuleCounts:
        """Training examples that overlap with any evaluated task."""
        return _rule_counts(self._counts[:, -1])

    def evaluated(self) -> UInt8[np.ndarray, " E"]:
        """Return the code of the strictest rule for every evaluated example."""
        index = self._index
        codes = np.zeros(len(index.keys), dtype=np.uint8)
        examples, _ = index.grams.examples.joined(np.flatnonzero(self._grams_seen))
        codes[examples] = np.where(index.is_short[examples], _WHOLE, _NGRAM)
        examples, _ = index.exact.examples.joined(np.flatnonzero(self._exact_seen))
        codes[examples] = _EXACT
        return codes

    def pairs(self) -> list[PairOverlap]:
        """Return what is shared with each evaluated task, without those that share nothing."""
        evaluated = _counts_by_task(self.evaluated(), self._index)
        return [
            PairOverlap(
                training_task=self._name,
                evaluated_task=name,
                training=_rule_counts(self._counts[:, number]),
                evaluated=evaluated[name],
                shown=tuple(self._shown.get(number, ())),
            )
            for number, name in enumerate(self._index.tasks)
            if evaluated[name].total
        ]


def _shared(example: Example, task: int, code: int, index: EvaluationIndex) -> SharedText:
    """Find one example of a task that a training example overlaps with, and what they share."""
    hashed = HashedExamples.of((example,), index.num_words)
    table, hashes = (index.exact, hashed.exact) if code == _EXACT else (index.grams, hashed.grams)
    places = table.places(hashes)
    first, owner = next(
        (start, owners[0])
        for start in np.flatnonzero(places >= 0).tolist()
        if (owners := _owners(int(places[start]), table, task, index))
    )
    return SharedText(
        training_key=example.key,
        evaluated_key=index.keys[owner],
        rule=_RULES[code],
        text=" ".join(words_of(example)[first : first + index.num_words]),
    )


def _owners(place: int, table: _Table, task: int, index: EvaluationIndex) -> list[int]:
    """Return the examples of one task that have a hash."""
    examples, _ = table.examples.joined(np.asarray([place]))
    return examples[index.task_of[examples] == task].tolist()


def _counts_by_task(
    codes: UInt8[np.ndarray, " E"], index: EvaluationIndex
) -> dict[str, RuleCounts]:
    shape = (len(index.tasks), _EXACT + 1)
    both = np.bincount(index.task_of * shape[1] + codes, minlength=shape[0] * shape[1])
    return {
        name: _rule_counts(row) for name, row in zip(index.tasks, both.reshape(shape), strict=True)
    }


def _rule_counts(counts: Int[np.ndarray, " 4"]) -> RuleCounts:
    return RuleCounts(**{rule: int(counts[code]) for code, rule in _RULES.items()})


def _table(
    hashes: UInt64[np.ndarray, " N"],
    examples: Int[np.ndarray, " N"],
    task_of: Int[np.ndarray, " E"],
) -> _Table:
    order = np.lexsort((examples, hashes))
    hashes, examples = hashes[order], examples[order]
    # Examples are numbered task by task, so the tasks of one hash ascend too.
    return _Table(
        hashes=hashes[_is_new(hashes)],
        examples=_lists(hashes, examples),
        tasks=_lists(hashes, task_of[examples]),
    )


def _lists(hashes: UInt64[np.ndarray, " N"], values: Int[np.ndarray, " N"]) -> _Lists:
    """Group values by their hash, each value once; hashes ascend, and values for each of them."""
    starts_group = _is_new(hashes)
    kept = starts_group | _is_new(values)
    starts = np.flatnonzero(starts_group[kept])
    return _Lists(offsets=np.append(starts, int(kept.sum())).astype(np.int64), values=values[kept])


def _is_new(values: Int[np.ndarray, " N"] | UInt64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Say of each value whether it differs from the one before."""
    new = np.ones(len(values), dtype=np.bool_)
    new[1:] = values[1:] != values[:-1]
    return new
