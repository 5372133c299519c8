"""Log-likelihoods of continuations, every token of their texts computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flanmoe.core.console import progress
from flanmoe.evaluation.lm.batches import BatchSize, in_batches
from flanmoe.evaluation.lm.forward import Forward
from flanmoe.evaluation.lm.journal import Journal, request_key
from flanmoe.evaluation.lm.likelihoods import token_likelihoods
from flanmoe.evaluation.lm.passes import MOST_LOGITS
from flanmoe.evaluation.lm.prefixes import Prefixes
from flanmoe.evaluation.lm.requests import Answer, Encoded, Tokens
from flanmoe.evaluation.lm.rows import TextLabels, row_batch
from flanmoe.evaluation.lm.shared_attention import RowsView, Stored
from flanmoe.evaluation.lm.token_tree import Group, Row, Text, num_computed, plan
from flanmoe.evaluation.lm.work import Work


@dataclass(frozen=True, slots=True)
class Scoring:
    """Requests as distinct texts, and the groups in which they are read.

    Attributes:
        members: for each text the requests that read it.
        groups: what is read, in order.
        num_tokens: tokens that are computed.
        num_apart: tokens of all requests together.
    """

    members: tuple[tuple[int, ...], ...]
    groups: tuple[Group, ...]
    num_tokens: int
    num_apart: int


def plan_scoring(requests: Sequence[Encoded], *, sharing: bool) -> Scoring:
    """Put requests that read the same tokens together, and common beginnings of the others.

    Args:
        requests: what is scored.
        sharing: whether the model can share beginnings; without it, texts are only sorted.
    """
    by_inputs: dict[Tokens, list[int]] = {}
    for number, request in enumerate(requests):
        by_inputs.setdefault(request.inputs, []).append(number)
    members = tuple(tuple(numbers) for numbers in by_inputs.values())
    texts = [
        Text(inputs, len(inputs) - max(requests[number].num_scored for number in numbers))
        for inputs, numbers in by_inputs.items()
    ]
    groups = plan(texts) if sharing else apart(texts)
    return Scoring(
        members, tuple(groups), num_computed(groups), sum(len(one.inputs) for one in requests)
    )


def apart(texts: Sequence[Text]) -> list[Group]:
    """Return every text in a row of its own, longest first, for a model that cannot share."""
    rows = [
        Row(text.tokens, tuple(range(-1, len(text.tokens) - 1)), ((number, len(text.tokens) - 1),))
        for number, text in enumerate(texts)
    ]
    return [Group(None, tuple(sorted(rows, key=lambda row: -len(row.tokens))))] if rows else []


class Scorer:
    """Scores requests with one model.

    Args:
        forward: runs the model.
        size: rows in a batch.
        journal: finished requests.
        work: counts what is read.
        sharing: whether the model can share beginnings.
    """

    def __init__(
        self, forward: Forward, size: BatchSize, journal: Journal, work: Work, *, sharing: bool
    ) -> None:
        self._forward = forward
        self._size = size
        self._journal = journal
        self._work = work
        self._sharing = sharing
        self._labels = TextLabels(None)

    def score(
        self, requests: Sequence[Encoded], labels: Sequence[int] | None = None
    ) -> list[Answer]:
        """Return log-likelihood in nats and whether it is the likeliest, request by request.

        Args:
            requests: what is scored.
            labels: for each request the number of its task, for a listener.
        """
        planned = plan_scoring(requests, sharing=self._sharing)
        self._labels = TextLabels(
            [labels[numbers[0]] for numbers in planned.members] if labels else None
        )
        keys = [request_key("score", one.tokens, one.num_scored) for one in requests]
        answers: dict[int, Answer] = {}
        prefixes = Prefixes(self._forward, self._work)
        self._work.shared_tokens += planned.num_apart - planned.num_tokens
        with progress("evaluating", total=planned.num_tokens, unit="tokens") as advance:
            for group in planned.groups:
                for found, num_tokens in self._group(group, planned, requests, keys, prefixes):
                    answers |= found
                    advance(num_tokens)
        return [answers[number] for number in range(len(requests))]

    def _group(
        self,
        group: Group,
        planned: Scoring,
        requests: Sequence[Encoded],
        keys: Sequence[str],
        prefixes: Prefixes,
    ) -> Iterator[tuple[dict[int, Answer], int]]:
        """Yield answers by request number, batch by batch, with the tokens that they took."""

        def members(rows: Sequence[Row]) -> list[int]:
            return [one for row in rows for text, _ in row.ends for one in planned.members[text]]

        def run(rows: Sequence[Row]) -> dict[int, Answer]:
            numbers = members(rows)
            known = self._journal.known(keys[number] for number in numbers)
            if known is not None:
                return {
                    number: (float(likelihood), bool(greedy))
                    for number, (likelihood, greedy) in zip(numbers, known, strict=True)
                }
            stored = prefixes.stored(group.prefix, self._labels.first(rows))
            found = self._batch(rows, stored, planned, requests)
            self._journal.add([(keys[number], found[number]) for number in numbers])
            return found

        vocabulary_size = self._forward.vocabulary_size
        most_needed = max(
            (requests[number].num_scored for number in members(group.rows)), default=1
        )

        def most(longest: int) -> int:
            by_logits = MOST_LOGITS // (vocabulary_size * most_needed)
            return min(self._size.reading(longest), max(by_logits, 1))

        for rows, found in in_batches(
            group.rows, length=_length, most=most, size=self._size, run=run
        ):
            yield found, sum(map(_length, rows))

    def _batch(
        self,
        rows: Sequence[Row],
        stored: Stored | None,
        planned: Scoring,
        requests: Sequence[Encoded],
    ) -> dict[int, Answer]:
        device = self._forward.device
        batch = row_batch(rows, num_before=stored.length if stored else 0, device=device)
        asked = _Asked()
        for number, row in enumerate(rows):
            for text, place in row.ends:
                for member in planned.members[text]:
                    asked.add(member, number, row, place, requests[member].targets)
        view = RowsView(stored, batch.positions, batch.visible) if self._sharing else None
        positions = batch.positions if self._sharing else None
        labels = self._labels.of(batch)
        logits = self._forward.logits(batch.tokens, positions, asked.places(device), view, labels)
        self._work.real_tokens += batch.num_real
        self._work.padding_tokens += batch.num_padding
        return asked.answers(logits)


class _Asked:
    """Which logits a batch is asked for, and what they are asked."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], int] = {}
        self._of: dict[int, tuple[list[int], Tokens]] = {}

    def add(self, request: int, number: int, row: Row, end: int, targets: Tokens) -> None:
        """Ask for the targets of one request, whose text ends at `end` of a row."""
        path = row.path(end, len(targets))
        found = [self._places.setdefault((number, place), len(self._places)) for place in path]
        self._of[request] = (found, targets)

    def places(self, device: torch.device) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Return rows and columns of the logits."""
        rows, columns = zip(*self._places, strict=True)
        return torch.tensor(rows, device=device), torch.tensor(columns, device=device)

    def answers(self, logits: Float[Tensor, "N V"]) -> dict[int, Answer]:
        """Return the answer to each request."""
        likelihoods, greedy = token_likelihoods(
            logits,
            [place for found, _ in self._of.values() for place in found],
            [token for _, targets in self._of.values() for token in targets],
        )
        answers: dict[int, Answer] = {}
        start = 0
        for request, (found, _) in self._of.items():
            end = start + len(found)
            answers[request] = (float(likelihoods[start:end].sum()), all(greedy[start:end]))
            start = end
        return answers


def _length(row: Row) -> int:
    return len(row.tokens)
