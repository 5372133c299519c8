"""A decoder as an lm-eval language model that computes every shared beginning once.

lm-eval's own `HFLM` reads every prompt whole, moves the line break at the end of a chat prompt into
the answer, makes logits over the whole vocabulary at every position, and cuts texts that are too long
with nothing but a log line.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast, final

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.evaluation.lm.batches import BatchSize
from flanmoe.evaluation.lm.expectation import Load
from flanmoe.evaluation.lm.forward import Forward
from flanmoe.evaluation.lm.generation import Writer
from flanmoe.evaluation.lm.generation_settings import warn_of_settings_without_effect
from flanmoe.evaluation.lm.harness import quiet_lm_eval
from flanmoe.evaluation.lm.journal import Journal
from flanmoe.evaluation.lm.language_model import LanguageModel, end_tokens, no_number
from flanmoe.evaluation.lm.listening import Listener
from flanmoe.evaluation.lm.passes import Precision
from flanmoe.evaluation.lm.probe import can_share
from flanmoe.evaluation.lm.requests import (
    Answer,
    Encoded,
    encode_generations,
    encode_pairs,
)
from flanmoe.evaluation.lm.scoring import Scorer, plan_scoring
from flanmoe.evaluation.lm.token_tree import mean_before
from flanmoe.evaluation.lm.trial import Trial

# The decorator that registers HFLM with lm-eval hides the type of its constructor.
_HARNESS_MODEL: Any = HFLM


@final
class DecoderLM(LanguageModel):
    """Scores and writes with a causal language model (see `flanmoe.evaluation.lm.build_lm`).

    Attributes:
        shares: whether common beginnings are computed once; without it every text is read whole, and answers
            are written by transformers' `generate` through lm-eval's `HFLM`.
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
        self._precision: Precision = precision
        self._forward = Forward(model, precision, listener)
        self.shares = can_share(model)
        size = BatchSize(batch_size, model.device)
        self._size = size
        self._trial = Trial(self._forward, sharing=self.shares)
        self._scorer = Scorer(self._forward, size, journal, self.work, sharing=self.shares)
        self._writer = Writer(
            self._forward,
            cast(PreTrainedTokenizerBase, self.tokenizer),
            end_tokens(model, tokenizer),
            size,
            journal,
            self.work,
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts in nats, in windows of the model's length."""
        windows = [self._windows(request.args[0]) for request in requests]
        answers = iter(self.score([window for text in windows for window in text]))
        return [sum(next(answers)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes greedily up to a stop text.

        Settings of the model with which transformers' `generate` would write something else are named in a
        warning.

        Raises:
            ModelError: if logits are no numbers; names the task and the question.
            UserError: if a task asks for sampling.
        """
        asked: list[Any] = [request.args for request in requests]
        encoded = encode_generations(self.tokenizer, asked, max_length=self._max_length)
        warn_of_settings_without_effect(self._model)
        if not self.shares:
            with self._with_capacity():
                return self._written_by_the_harness(requests)

        def complain(number: int) -> None:
            raise no_number(requests[number], "logits are no numbers")

        with self._with_capacity(), self._forward.sharing():
            return self._writer.write(encoded, complain, self._labels(requests))

    def encode_all(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokenise contexts and their continuations, each pair as one text."""
        return encode_pairs(
            self.tokenizer,
            [self._with_context(*pair) for pair in pairs],
            max_length=self._max_length,
        )

    def truncates(self, context: str, max_new_tokens: int) -> bool:
        """Return whether a context is cut on its left so that an answer fits behind it."""
        asked = (context, {"max_gen_toks": max_new_tokens})
        return encode_generations(self.tokenizer, [asked], max_length=self._max_length)[0].truncated

    def score(
        self, requests: Sequence[Encoded], labels: Sequence[int] | None = None
    ) -> list[Answer]:
        """Score encoded requests, each distinct beginning once.

        Args:
            requests: what is scored.
            labels: for each request the number of its task, for a listener.
        """
        with self._with_capacity(), self._forward.sharing() if self.shares else nullcontext():
            return self._scorer.score(requests, labels)

    def load_of(self, scored: Sequence[Encoded], asked: Sequence[Any]) -> Load:
        """Return what encoded requests and contexts to answer make the model compute."""
        planned = plan_scoring(scored, sharing=self.shares)
        load = self._writer.load(
            encode_generations(self.tokenizer, asked, max_length=self._max_length)
        )
        return load + Load(planned.num_tokens, before=mean_before(planned.groups))

    def try_out(self, rows: int, length: int, before: int) -> None:
        """Make one pass over arbitrary tokens behind others, to see how long it takes."""
        self._trial.run(rows, length, before)

    def _with_context(self, context: str, continuation: str) -> tuple[str, str]:
        # As in lm-eval: what begins a text is scored after the token that stands before texts.
        tokenizer = cast(PreTrainedTokenizerBase, self.tokenizer)
        return context or str(tokenizer.bos_token or tokenizer.eos_token or ""), continuation

    def _windows(self, text: str) -> list[Encoded]:
        tokenizer = cast(PreTrainedTokenizerBase, self.tokenizer)
        first: Any = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        windows = map(
            make_disjoint_window,
            get_rolling_token_windows(
                token_list=tokens, prefix_token=first, max_seq_len=self._max_length, context_len=1
            ),
        )
        return [Encoded((*before, *scored), len(scored)) for before, scored in windows]

    def _written_by_the_harness(self, requests: list[Instance]) -> list[str]:
        with quiet_lm_eval():
            model = _HARNESS_MODEL(
                pretrained=self._model,
                tokenizer=copy.deepcopy(self.tokenizer),
                backend="causal",
                batch_size=self._size.reading(self._max_length),
                add_bos_token=False,
                mixed_precision_dtype="bfloat16" if self._precision == "bfloat16" else None,
            )
            return model.generate_until(requests, disable_tqdm=True)
