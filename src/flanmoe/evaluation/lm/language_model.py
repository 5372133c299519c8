"""What our lm-eval language models have in common: requests in, answers out, errors that name the question."""

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.errors import ModelError
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.evaluation.lm.capacity import without_drops
from flanmoe.evaluation.lm.expectation import Load, expected_seconds
from flanmoe.evaluation.lm.limits import longest_text
from flanmoe.evaluation.lm.listening import Listener
from flanmoe.evaluation.lm.requests import Answer, Encoded
from flanmoe.evaluation.lm.work import Work


class LanguageModel(LM):
    """Scores and writes with one model (see `flanmoe.evaluation.lm.build_lm`).

    Args:
        model: the model.
        tokenizer: its fast tokenizer; it is not changed.
        listener: names tasks by numbers; None where nobody listens.
        capacity_drops: whether experts drop tokens above their capacity.

    Attributes:
        tokenizer: a copy of the model's tokenizer.
        work: tokens that have gone through the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        listener: Listener | None,
        *,
        capacity_drops: bool,
    ) -> None:
        super().__init__()
        self._model = model
        self._capacity_drops = capacity_drops
        self.tokenizer = cast(Tokenizer, copy.deepcopy(tokenizer))
        self.work = Work()
        self._max_length = longest_text(model.config, tokenizer)
        self._listener = listener

    @abstractmethod
    def encode_all(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Tokenise contexts and their continuations for this model."""

    @abstractmethod
    def score(
        self, requests: Sequence[Encoded], labels: Sequence[int] | None = None
    ) -> list[Answer]:
        """Score encoded requests.

        Args:
            requests: what is scored.
            labels: for each request the number of its task, for a listener.
        """

    @abstractmethod
    def truncates(self, context: str, max_new_tokens: int) -> bool:
        """Return whether a context is cut on its left when the model is to write so many tokens."""

    @abstractmethod
    def load_of(self, scored: Sequence[Encoded], asked: Sequence[Any]) -> Load:
        """Return what encoded requests and contexts to answer make the model compute."""

    def load(self, requests: Sequence[Instance]) -> Load:
        """Return what requests for likelihoods and answers make the model compute."""
        pairs: list[Any] = [one.args for one in requests if one.request_type == "loglikelihood"]
        asked = [one.args for one in requests if one.request_type == "generate_until"]
        return self.load_of(self.encode_all(pairs), asked)

    @abstractmethod
    def try_out(self, rows: int, length: int, before: int) -> None:
        """Make one pass over arbitrary tokens, to see how long it takes.

        Args:
            rows, length: shape of the pass; length 1 is a step of writing.
            before: tokens before each row that are kept and not read again.
        """

    def expected_seconds(self, requests: Sequence[Instance]) -> float:
        """Return about how long requests of both kinds will take, at most; tries a few passes."""
        return expected_seconds(self.load(requests), self.try_out)

    def encode(self, context: str, continuation: str) -> Encoded:
        """Tokenise a request for this model."""
        return self.encode_all([(context, continuation)])[0]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Return for each (context, continuation) its log-likelihood in nats, and if it is greedy.

        `disable_tqdm` has no effect: progress is shown on stderr by `core.console`.

        Raises:
            ModelError: if a log-likelihood is no number; names the task and the question.
        """
        pairs: list[Any] = [request.args for request in requests]
        encoded = self.encode_all(pairs)
        answers = self.score(encoded, self._labels(requests))
        for request, (likelihood, _) in zip(requests, answers, strict=True):
            if not math.isfinite(likelihood):
                raise no_number(request, f"a log-likelihood is {likelihood}")
        return answers

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation the way the model was trained on."""
        tokenizer = cast(PreTrainedTokenizerBase, self.tokenizer)
        return cast(
            str,
            tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            ),
        )

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's caches."""
        name = cast(PreTrainedTokenizerBase, self.tokenizer).name_or_path
        return name.replace("/", "__")

    def _with_capacity(self) -> AbstractContextManager[None]:
        """Return what is open while requests are answered: without drops, unless they are asked for."""
        return nullcontext() if self._capacity_drops else without_drops(self._model)

    def _labels(self, requests: Sequence[Instance]) -> list[int] | None:
        if self._listener is None:
            return None
        return [self._listener.label(str(request.task_name)) for request in requests]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end a text, by the model's generation settings and its tokenizer."""
    stated: Any = model.generation_config.eos_token_id if model.generation_config else None
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(one for one in [*ids, tokenizer.eos_token_id] if one is not None)


def no_number(request: Instance, what: str) -> ModelError:
    """Return the error about a request whose answer is not made of numbers."""
    doc = request.doc
    key = doc.get("key", request.doc_id) if isinstance(doc, dict) else request.doc_id
    return ModelError(
        f"The model's outputs must be finite numbers, but for question `{key}` of task `{request.task_name}` "
        f"{what}. The model's weights are damaged, or training diverged."
    )
