"""Log-likelihoods of answers from an encoder-decoder, every context encoded once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from flanmoe.core.console import progress
from flanmoe.evaluation.lm.batches import BatchSize, in_batches
from flanmoe.evaluation.lm.encodings import EncoderDecoderPasses, Encodings
from flanmoe.evaluation.lm.journal import Journal, request_key
from flanmoe.evaluation.lm.likelihoods import token_likelihoods
from flanmoe.evaluation.lm.passes import MOST_LOGITS
from flanmoe.evaluation.lm.requests import Answer, Encoded, Tokens
from flanmoe.evaluation.lm.work import Work

# Answers are short: filling them up costs less than another pass.
_SHORTEST_SHARE_OF_ANSWERS = 0.5


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is read of an answer behind the start: all of its tokens but the last, which is only predicted.

    Attributes:
        row: which context of its batch it answers.
        tokens: at least one.
    """

    row: int
    tokens: Tokens


@dataclass(slots=True)
class _Found:
    """Answers of a batch while their parts come in, by request number."""

    likelihoods: dict[int, float] = field(default_factory=dict[int, float])
    greedy: dict[int, bool] = field(default_factory=dict[int, bool])

    def add(self, request: int, likelihood: float, greedy: bool) -> None:
        self.likelihoods[request] = self.likelihoods.get(request, 0.0) + likelihood
        self.greedy[request] = self.greedy.get(request, True) and greedy

    def answers(self) -> dict[int, Answer]:
        return {
            request: (likelihood, self.greedy[request])
            for request, likelihood in self.likelihoods.items()
        }


class EncoderDecoderScorer:
    """Scores requests with one model.

    A context goes through the encoder once and the decoder's start token is read once for it, which gives
    what is expected as the first token of every answer; the other tokens of longer answers are read from there.

    Args:
        passes: runs the model.
        size: rows in a batch.
        journal: finished requests.
        work: counts what is read.
    """

    def __init__(
        self, passes: EncoderDecoderPasses, size: BatchSize, journal: Journal, work: Work
    ) -> None:
        self._passes = passes
        self._size = size
        self._journal = journal
        self._work = work

    def score(
        self, requests: Sequence[Encoded], labels: Sequence[int] | None = None
    ) -> list[Answer]:
        """Return log-likelihood in nats and whether it is the likeliest, request by request.

        Args:
            requests: what is scored.
            labels: for each request the number of its task, for a listener.
        """
        members: dict[Tokens, list[int]] = {}
        for number, request in enumerate(requests):
            members.setdefault(request.context, []).append(number)
        contexts = sorted(members, key=lambda context: -len(context))
        keys = [request_key("score", one.tokens, one.num_scored) for one in requests]
        total = sum(map(len, contexts))
        self._work.shared_tokens += sum(len(one.context) for one in requests) - total

        def run(batch: Sequence[Tokens]) -> dict[int, Answer]:
            numbers = [number for context in batch for number in members[context]]
            known = self._journal.known(keys[number] for number in numbers)
            if known is not None:
                return {
                    number: (float(likelihood), bool(greedy))
                    for number, (likelihood, greedy) in zip(numbers, known, strict=True)
                }
            tasks = labels and [labels[members[context][0]] for context in batch]
            found = self._batch(batch, tasks, members, requests)
            self._journal.add([(keys[number], found[number]) for number in numbers])
            return found

        answers: dict[int, Answer] = {}
        with progress("evaluating", total=total, unit="tokens") as advance:
            for batch, found in in_batches(
                contexts, length=len, most=lambda n: self._most(n, 1), size=self._size, run=run
            ):
                answers |= found
                advance(sum(map(len, batch)))
        return [answers[number] for number in range(len(requests))]

    def _most(self, longest: int, num_logits: int) -> int:
        by_logits = MOST_LOGITS // (self._passes.vocabulary_size * num_logits)
        return max(min(self._size.reading(longest), by_logits), 1)

    def _batch(
        self,
        contexts: Sequence[Tokens],
        labels: Sequence[int] | None,
        members: dict[Tokens, list[int]],
        requests: Sequence[Encoded],
    ) -> dict[int, Answer]:
        state, logits = self._passes.start(*self._passes.encode(contexts, labels), labels)
        real = sum(map(len, contexts))
        self._work.real_tokens += real + len(contexts)
        self._work.padding_tokens += state.mask.numel() - real
        asked = [
            (number, row) for row, context in enumerate(contexts) for number in members[context]
        ]
        likelihoods, greedy = token_likelihoods(
            logits,
            [row for _, row in asked],
            [requests[number].targets[0] for number, _ in asked],
        )
        found = _Found()
        rests: dict[_Rest, list[int]] = {}
        for place, (number, row) in enumerate(asked):
            found.add(number, float(likelihoods[place]), greedy[place])
            if (targets := requests[number].targets)[1:]:
                rests.setdefault(_Rest(row, targets[:-1]), []).append(number)
        self._read_rests(state, rests, requests, found)
        return found.answers()

    def _read_rests(
        self,
        state: Encodings,
        rests: dict[_Rest, list[int]],
        requests: Sequence[Encoded],
        found: _Found,
    ) -> None:
        num_context = state.mask.shape[1]
        batches = in_batches(
            sorted(rests, key=lambda rest: -len(rest.tokens)),
            length=lambda rest: len(rest.tokens),
            # Every row holds its context's keys and values beside its own tokens.
            most=lambda longest: self._most(num_context + longest, longest),
            size=self._size,
            shortest_share=_SHORTEST_SHARE_OF_ANSWERS,
            run=lambda batch: self._read(state, batch, rests, requests),
        )
        for _, scored in batches:
            for number, likelihood, greedy in scored:
                found.add(number, likelihood, greedy)

    def _read(
        self,
        state: Encodings,
        batch: Sequence[_Rest],
        rests: dict[_Rest, list[int]],
        requests: Sequence[Encoded],
    ) -> list[tuple[int, float, bool]]:
        texts = [rest.tokens for rest in batch]
        logits, own = self._passes.read_on(state.only([rest.row for rest in batch]), texts)
        real = sum(map(len, texts))
        self._work.real_tokens += real
        self._work.padding_tokens += len(texts) * max(map(len, texts)) - real
        asked = [
            (number, places)
            for rest, places in zip(batch, own, strict=True)
            for number in rests[rest]
        ]
        likelihoods, greedy = token_likelihoods(
            logits,
            [place for _, places in asked for place in places],
            [token for number, _ in asked for token in requests[number].targets[1:]],
        )
        scored: list[tuple[int, float, bool]] = []
        start = 0
        for number, places in asked:
            end = start + len(places)
            scored.append((number, float(likelihoods[start:end].sum()), all(greedy[start:end])))
            start = end
        return scored
