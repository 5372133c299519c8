"""Greedy answers of an encoder-decoder, every context encoded and answered once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flanmoe.core.console import progress
from flanmoe.evaluation.lm.batches import BatchSize, in_batches
from flanmoe.evaluation.lm.encodings import EncoderDecoderPasses, Encodings
from flanmoe.evaluation.lm.greedy import SHRINK_AT, Complain, likeliest
from flanmoe.evaluation.lm.journal import Journal, request_key
from flanmoe.evaluation.lm.requests import Generation, Tokens
from flanmoe.evaluation.lm.stopping import Answers
from flanmoe.evaluation.lm.work import Work


class EncoderDecoderWriter:
    """Writes greedy answers with one model.

    Requests with one context share its answer up to where each of them stops.

    Args:
        passes: runs the model.
        tokenizer: reads what is written, to find stops.
        end_tokens: tokens that end every answer.
        first_token: token with which every answer begins, None for the likeliest.
        size: rows in a batch.
        journal: finished requests.
        work: counts what is read and written.
    """

    def __init__(
        self,
        passes: EncoderDecoderPasses,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: frozenset[int],
        first_token: int | None,
        size: BatchSize,
        journal: Journal,
        work: Work,
    ) -> None:
        self._passes = passes
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._first_token = first_token
        self._size = size
        self._journal = journal
        self._work = work

    def write(
        self,
        requests: Sequence[Generation],
        complain: Complain,
        labels: Sequence[int] | None = None,
    ) -> list[str]:
        """Return the answer to each request, without what stopped it.

        Args:
            requests: what is answered.
            complain: called with the place of a request whose logits are no numbers; raises.
            labels: for each request the number of its task, for a listener.
        """
        members: dict[Tokens, list[int]] = {}
        for number, request in enumerate(requests):
            members.setdefault(request.tokens, []).append(number)
        contexts = sorted(members, key=lambda context: -len(context))
        keys = [request_key("write", one.tokens, one.stops, one.max_new_tokens) for one in requests]
        self._work.shared_tokens += sum(
            len(context) * (len(members[context]) - 1) for context in contexts
        )

        def run(batch: Sequence[Tokens]) -> dict[int, str]:
            numbers = [number for context in batch for number in members[context]]
            known = self._journal.known(keys[number] for number in numbers)
            if known is not None:
                return dict(zip(numbers, map(str, known), strict=True))
            tasks = labels and [labels[members[context][0]] for context in batch]
            rows = [row for row, context in enumerate(batch) for _ in members[context]]
            texts = self._batch(
                batch,
                tasks,
                Answers(
                    [requests[number] for number in numbers], self._tokenizer, self._end_tokens
                ),
                rows,
                lambda row: complain(members[batch[row]][0]),
            )
            self._journal.add([(keys[n], text) for n, text in zip(numbers, texts, strict=True)])
            return dict(zip(numbers, texts, strict=True))

        answers: dict[int, str] = {}
        with progress("writing", total=len(requests), unit="answers") as advance:
            for _, found in in_batches(
                contexts,
                length=len,
                most=lambda _: self._size.writing(),
                size=self._size,
                # While answers are written, every row has one token: lengths need not be alike.
                shortest_share=0.0,
                run=run,
            ):
                answers |= found
                advance(len(found))
        return [answers[number] for number in range(len(requests))]

    def _batch(
        self,
        contexts: Sequence[Tokens],
        labels: Sequence[int] | None,
        answers: Answers,
        row_of: Sequence[int],
        complain: Complain,
    ) -> list[str]:
        """Write until every answer is finished; `row_of` says which context each of them belongs to."""
        state, logits = self._passes.start(*self._encode(contexts, labels), labels)
        self._work.real_tokens += len(contexts)
        rows = list(range(len(contexts)))
        forced = self._first_token
        while True:
            live = {row_of[number] for number in answers.live}
            chosen = likeliest(logits, rows, live, complain)
            if forced is not None:
                chosen, forced = dict.fromkeys(rows, forced), None
            self._work.generated_tokens += len(live)
            answers.add({number: chosen[row_of[number]] for number in answers.live})
            live = {row_of[number] for number in answers.live}
            if not live:
                return answers.texts()
            if len(live) <= SHRINK_AT * len(rows):
                state = state.only([place for place, row in enumerate(rows) if row in live])
                rows = sorted(live)
            logits = self._step(state, [chosen[row] for row in rows])

    def _encode(
        self, contexts: Sequence[Tokens], labels: Sequence[int] | None
    ) -> tuple[Float[Tensor, "B S H"], Int[Tensor, "B S"]]:
        """Encode contexts, longest first, in as many passes as fit; the shorter ones are filled up."""
        longest = len(contexts[0])
        hidden: list[Tensor] = []
        masks: list[Tensor] = []
        start = 0
        while start < len(contexts):
            end = start + self._size.reading(len(contexts[start]))
            part = contexts[start:end]
            encoded, mask = self._passes.encode(part, labels and labels[start:end])
            real = sum(map(len, part))
            self._work.real_tokens += real
            self._work.padding_tokens += mask.numel() - real
            missing = longest - mask.shape[1]
            hidden.append(torch.nn.functional.pad(encoded, (0, 0, 0, missing)))
            masks.append(torch.nn.functional.pad(mask, (0, missing)))
            start = end
        return torch.cat(hidden), torch.cat(masks)

    def _step(self, state: Encodings, tokens: Sequence[int]) -> Float[Tensor, "R V"]:
        read = torch.tensor(tokens, device=self._passes.device)[:, None]
        return self._passes.go_on(state, read)[:, -1]
