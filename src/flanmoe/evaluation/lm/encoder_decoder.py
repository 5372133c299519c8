"""An encoder-decoder as an lm-eval language model that encodes every context once.

lm-eval's own `HFLM` encodes a context once for each of its answer choices, makes logits over the whole
vocabulary for every token of an answer, scores the line break at the end of a prompt as part of the answer, and
writes answers that are longer than asked for by the length of their contexts.
"""

from collections.abc import Sequence
from typing import Any, cast, final

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.errors import ModelError
from flanmoe.evaluation.lm.batches import BatchSize
from flanmoe.evaluation.lm.encoder_decoder_generation import EncoderDecoderWriter
from flanmoe.evaluation.lm.encoder_decoder_scoring import EncoderDecoderScorer
from flanmoe.evaluation.lm.encodings import EncoderDecoderPasses
from flanmoe.evaluation.lm.expectation import Load
from flanmoe.evaluation.lm.generation_settings import (
    forced_first_token,
    warn_of_settings_without_effect,
)
from flanmoe.evaluation.lm.journal import Journal
from flanmoe.evaluation.lm.language_model import LanguageModel, end_tokens, no_number
from flanmoe.evaluation.lm.listening import Listener
from flanmoe.evaluation.lm.passes import Precision
from flanmoe.evaluation.lm.questions import encode_pairs_apart, encode_questions
from flanmoe.evaluation.lm.requests import Answer, Encoded, Tokens


@final
class EncoderDecoderLM(LanguageModel):
    """Scores and writes with an encoder-decoder (see `flanmoe.evaluation.lm.build_lm`).

    Contexts go into the encoder, answers come from the decoder. Likelihoods are those of lm-eval's `HFLM`
    (`backend="seq2seq"`) but for white space at the end of contexts (`flanmoe.evaluation.lm.questions`). All
    answers that one call asks for to one context share its encoding; between calls nothing is kept, since
    tasks hardly ever have the same context scored and answered. Experts take every token that is routed to
    them, unless `capacity_drops` is asked for (`flanmoe.evaluation.lm.capacity`).

    Raises:
        ModelError: if the model does not say with which token its decoder starts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None,
        precision: Precision,
        journal: Journal,
        listener: Listener | None = None,
        capacity_drops: bool = False,
    ) -> None:
        super().__init__(model, tokenizer, listener, capacity_drops=capacity_drops)
        passes = EncoderDecoderPasses(model, precision, listener)
        self._passes = passes
        size = BatchSize(batch_size, model.device)
        self._size = size
        self._scorer = EncoderDecoderScorer(passes, size, journal, self.work)
        self._writer = EncoderDecoderWriter(
            passes,
            cast(PreTrainedTokenizerBase, self.tokenizer),
            end_tokens(model, tokenizer),
            forced_first_token(model),
            size,
            journal,
            self.work,
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Refuse: an encoder-decoder gives no likelihood to a text that answers nothing.

        Raises:
            ModelError: always, if anything is asked.
        """
        if not requests:
            return []
        raise ModelError(
            f"An encoder-decoder scores answers to a context, but task `{requests[0].task_name}` asks for the "
            "likelihood of whole texts. Leave the task out, or evaluate a decoder-only model."
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes greedily up to a stop text.

        Settings of the model with which transformers' `generate` would write something else are named in a
        warning.

        Raises:
            DataError: if an answer needs more positions than the decoder has.
            ModelError: if logits are no numbers; names the task and the question.
            UserError: if a task asks for sampling.
        """
        asked: list[Any] = [request.args for request in requests]
        encoded = encode_questions(self.tokenizer, asked, max_length=self._max_length)

        def complain(number: int) -> None:
            raise no_number(requests[number], "logits are no numbers")

        warn_of_settings_without_effect(self._model)
        with self._with_capacity():
            return self._writer.write(encoded, complain, self._labels(requests))

    def encode_all(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokenise contexts and their continuations, each by itself."""
        return encode_pairs_apart(self.tokenizer, pairs, max_length=self._max_length)

    def load_of(self, scored: Sequence[Encoded], asked: Sequence[Any]) -> Load:
        """Return what encoded requests and contexts to answer make the model compute."""
        tokens = sum(one.num_scored for one in scored) + sum(
            len(context) for context in {one.context for one in scored}
        )
        written = encode_questions(self.tokenizer, asked, max_length=self._max_length)
        contexts: dict[Tokens, int] = {}
        for one in written:
            contexts[one.tokens] = max(one.max_new_tokens, contexts.get(one.tokens, 0))
        most = [contexts[context] for context in sorted(contexts, key=lambda one: -len(one))]
        rows = self._size.writing()
        steps = sum(max(most[start : start + rows]) for start in range(0, len(most), rows))
        tokens += sum(map(len, contexts))
        return Load(tokens, steps=steps, rows=min(rows, len(most)))

    def try_out(self, rows: int, length: int, before: int) -> None:
        """Make one pass over arbitrary tokens, to see how long it takes: of the decoder for one token a row.

        Nothing is kept before a row of the encoder, so `before` is 0.
        """
        contexts = [tuple(range(length))] * rows
        encoded = self._passes.encode(contexts, None)
        if length == 1:
            self._passes.start(*encoded, None)

    def truncates(self, context: str, max_new_tokens: int) -> bool:
        """Return whether a context is cut on its left; an answer takes no room from it."""
        asked = (context, {"max_gen_toks": max_new_tokens})
        return encode_questions(self.tokenizer, [asked], max_length=self._max_length)[0].truncated

    def score(
        self, requests: Sequence[Encoded], labels: Sequence[int] | None = None
    ) -> list[Answer]:
        """Score encoded requests, each distinct context once.

        Args:
            requests: what is scored.
            labels: for each request the number of its task, for a listener.
        """
        with self._with_capacity():
            return self._scorer.score(requests, labels)
