"""Greedy answers: contexts read from their shared beginning, then written token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flanmoe.core.console import progress
from flanmoe.evaluation.lm.batches import BatchSize, attempt
from flanmoe.evaluation.lm.expectation import Load
from flanmoe.evaluation.lm.forward import Forward
from flanmoe.evaluation.lm.greedy import SHRINK_AT, Complain, likeliest
from flanmoe.evaluation.lm.journal import Journal, request_key
from flanmoe.evaluation.lm.prefixes import Prefixes
from flanmoe.evaluation.lm.requests import Generation
from flanmoe.evaluation.lm.rows import TextLabels, row_batch
from flanmoe.evaluation.lm.shared_attention import KeysValues, RowsView, StepView, Stored
from flanmoe.evaluation.lm.stopping import Answers
from flanmoe.evaluation.lm.token_tree import (
    Group,
    Prefix,
    Row,
    Text,
    mean_before,
    num_computed,
    plan,
)
from flanmoe.evaluation.lm.work import Work
from flanmoe.evaluation.lm.written_rows import WrittenRows

# Tokens of the prefixes behind which the rows of one batch stand: their keys and values are all kept at
# once, 46 kB a token for a model of 135 million parameters in float32.
_MOST_PREFIX_TOKENS = 16384


def plan_writing(requests: Sequence[Generation]) -> list[Group]:
    """Return what to read before writing: every context in a row of its own after what it shares."""
    return plan(
        [Text(one.tokens, len(one.tokens) - 1) for one in requests],
        branching=False,
    )


class Writer:
    """Writes greedy answers with one model, which must be able to share beginnings.

    Args:
        forward: runs the model.
        tokenizer: reads what is written, to find stops.
        end_tokens: tokens that end every answer.
        size: rows in a batch.
        journal: finished requests.
        work: counts what is read and written.
    """

    def __init__(
        self,
        forward: Forward,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: frozenset[int],
        size: BatchSize,
        journal: Journal,
        work: Work,
    ) -> None:
        self._forward = forward
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._size = size
        self._journal = journal
        self._work = work
        self._labels = TextLabels(None)

    def write(
        self,
        requests: Sequence[Generation],
        complain: Complain,
        labels: Sequence[int] | None = None,
    ) -> list[str]:
        """Return the answer to each request, without what stopped it.

        Args:
            requests: what to go on from.
            complain: what to do about logits that are no numbers.
            labels: for each request the number of its task, for a listener.
        """
        first: dict[Generation, int] = {}
        for number, request in enumerate(requests):
            first.setdefault(request, number)
        distinct = list(first)
        self._labels = TextLabels([labels[number] for number in first.values()] if labels else None)
        texts = self._write(distinct, lambda place: complain(first[distinct[place]]))
        answers = dict(zip(distinct, texts, strict=True))
        return [answers[request] for request in requests]

    def load(self, requests: Sequence[Generation]) -> Load:
        """Return what is computed for these requests if no answer ends early."""
        asked = list(dict.fromkeys(requests))
        groups = plan_writing(asked)
        left = [_Item(group.prefix, row) for group in groups for row in group.rows]
        steps = rows = 0
        while left:
            number = _most(left, self._size.writing())
            steps += max(asked[item.request].max_new_tokens for item in left[:number])
            rows = max(rows, number)
            left = left[number:]
        return Load(
            tokens=num_computed(groups),
            before=mean_before(groups),
            steps=steps,
            context=sum(len(one.tokens) for one in asked) / max(len(asked), 1),
            rows=rows,
        )

    def _write(self, asked: Sequence[Generation], complain: Complain) -> list[str]:
        groups = plan_writing(asked)
        prefixes = Prefixes(self._forward, self._work)
        self._work.shared_tokens += sum(len(one.tokens) for one in asked) - num_computed(groups)
        texts: dict[int, str] = {}
        left = [_Item(group.prefix, row) for group in groups for row in group.rows]
        with progress("writing", total=len(asked), unit="answers") as advance:
            while left:
                batch = left[: _most(left, self._size.writing())]
                found = attempt(
                    lambda items: self._known_or_written(items, asked, prefixes, complain),
                    batch,
                    self._size,
                )
                if found is None:
                    continue
                left = left[len(batch) :]
                texts |= zip((item.request for item in batch), found, strict=True)
                advance(len(batch))
        return [texts[number] for number in range(len(asked))]

    def _known_or_written(
        self,
        items: Sequence["_Item"],
        asked: Sequence[Generation],
        prefixes: Prefixes,
        complain: Complain,
    ) -> list[str]:
        requests = [asked[item.request] for item in items]
        keys = [request_key("write", one.tokens, one.stops, one.max_new_tokens) for one in requests]
        known = self._journal.known(keys)
        if known is not None:
            return [str(text) for text in known]
        texts = self._batch(items, prefixes, requests, lambda place: complain(items[place].request))
        self._journal.add(list(zip(keys, texts, strict=True)))
        return texts

    def _batch(
        self,
        items: Sequence["_Item"],
        prefixes: Prefixes,
        requests: Sequence[Generation],
        complain: Complain,
    ) -> list[str]:
        answers = Answers(requests, self._tokenizer, self._end_tokens)
        room = max(one.max_new_tokens for one in requests)
        state, logits = self._read(items, prefixes, room)
        while True:
            chosen = likeliest(logits, state.rows, answers.live, complain)
            self._work.generated_tokens += len(answers.live)
            answers.add(chosen)
            if not answers.live:
                return answers.texts()
            if len(answers.live) <= SHRINK_AT * len(state.rows):
                state = state.only(answers.live)
            tokens = [chosen[row] for row in state.rows]
            # What is written for a finished row belongs to nobody.
            texts = [items[row].request if row in answers.live else -1 for row in state.rows]
            logits = self._step(state, tokens, self._labels.of_rows(texts))

    def _read(
        self, items: Sequence["_Item"], prefixes: Prefixes, room: int
    ) -> tuple[WrittenRows, Float[Tensor, "R V"]]:
        """Read the contexts; return what is kept of them, and the logits of what follows each."""
        stored = self._stored(items, prefixes)
        lengths = [len(item.row.tokens) for item in items]
        longest = max(lengths)
        state = WrittenRows.empty(lengths, stored, longest + room, self._forward.device)
        logits: list[Tensor] = []
        most = self._size.reading(longest)
        start = 0
        for prefix, number in state.prefixes():
            for first in range(start, start + number, most):
                part = items[first : min(first + most, start + number)]
                found, kept = self._read_rows([item.row for item in part], prefix)
                state.take(first, kept)
                logits.append(found)
            start += number
        state.column = longest
        return state, torch.cat(logits)

    def _stored(self, items: Sequence["_Item"], prefixes: Prefixes) -> list[Stored | None]:
        """Return what is kept of each row's prefix; held here, it outlives its turn in `prefixes`."""
        found: list[Stored | None] = []
        for number, item in enumerate(items):
            if number and item.prefix is items[number - 1].prefix:
                found.append(found[-1])
            else:
                found.append(prefixes.stored(item.prefix, self._labels.first([item.row])))
        return found

    def _read_rows(
        self, rows: Sequence[Row], stored: Stored | None
    ) -> tuple[Float[Tensor, "R V"], dict[int, KeysValues]]:
        device = self._forward.device
        batch = row_batch(rows, num_before=stored.length if stored else 0, device=device)
        view = RowsView(stored, batch.positions, None, keep=True)
        last = torch.tensor([len(row.tokens) - 1 for row in rows], device=device)
        places = (torch.arange(len(rows), device=device), last)
        labels = self._labels.of(batch)
        logits = self._forward.logits(batch.tokens, batch.positions, places, view, labels)
        self._work.real_tokens += batch.num_real
        self._work.padding_tokens += batch.num_padding
        return logits, view.kept

    def _step(
        self,
        state: WrittenRows,
        tokens: Sequence[int],
        labels: Int[np.ndarray, " R"] | None,
    ) -> Float[Tensor, "R V"]:
        device = self._forward.device
        positions = state.grow()
        end = state.column + 1
        view = StepView(
            state.prefixes(),
            state.layers,
            state.column,
            state.visible[:, :end],
            state.positions[:, :end],
        )
        places = torch.arange(len(tokens), device=device)
        logits = self._forward.logits(
            torch.tensor(tokens, device=device)[:, None],
            positions[:, None],
            (places, torch.zeros_like(places)),
            view,
            None if labels is None else torch.from_numpy(labels).to(device)[:, None],
        )
        state.column += 1
        return logits


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A context to go on from: its row, and the prefix before it."""

    prefix: Prefix | None
    row: Row

    @property
    def request(self) -> int:
        return self.row.ends[0][0]


def _most(items: Sequence[_Item], rows: int) -> int:
    """Return how many of the first items are written together: few enough rows and prefixes."""
    tokens = 0
    before: Prefix | None = None
    for number, item in enumerate(items[:rows]):
        if item.prefix is not None and item.prefix is not before:
            tokens += item.prefix.length
            if number and tokens > _MOST_PREFIX_TOKENS:
                return number
        before = item.prefix
    return min(rows, len(items))
