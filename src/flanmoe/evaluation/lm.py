"""An lm-eval language model around a model that is already loaded.

lm-eval's own `HFLM` would do, but for four things. It moves the line break at the end of a chat
prompt into the answer. It makes logits and a softmax over the whole vocabulary at every position of
the prompt. It cuts texts that are too long with nothing but a log line. Its progress bars cannot be
switched off through `evaluate`. `HeldOutLM` scores continuations itself and leaves the rest
(generation, whole texts, templates) to `HFLM`.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast, final

import torch
from jaxtyping import Float
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flanmoe.core.console import progress
from flanmoe.core.errors import DataError
from flanmoe.data.example import Rendered
from flanmoe.data.packing import tokenize
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.models.router_precision import run_routers_outside_autocast

Precision = Literal["float32", "bfloat16"]
Tokens = tuple[int, ...]
Answer = tuple[float, bool]

# The decorator that registers HFLM with lm-eval hides the type of its constructor.
_HARNESS_MODEL: Any = HFLM

# A batch closes before a text shorter than this share of its longest. Texts of a few hundred tokens
# fill a processor by themselves, so padding costs more than a larger batch gains.
_SHORTEST_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Encoded:
    """A context and its continuation as one token sequence.

    Attributes:
        tokens: both together.
        num_scored: how many tokens at the end are the continuation.
        truncated: whether tokens were cut off on the left.
    """

    tokens: Tokens
    num_scored: int
    truncated: bool = False

    @property
    def inputs(self) -> Tokens:
        """What the model reads: everything but the last token, which is only predicted."""
        return self.tokens[:-1]


@dataclass(slots=True)
class Work:
    """What a language model has computed so far: tokens that went through it."""

    real_tokens: int = 0
    padding_tokens: int = 0


@dataclass(slots=True)
class _Group:
    """Requests that read the same tokens and so share one forward pass; indices into the request list."""

    num_scored: int = 0
    members: list[int] = field(default_factory=list[int])


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, max_length: int
) -> Encoded:
    """Tokenise a context and its continuation together, exactly as training does.

    Nothing is added: a rendered prompt already holds the special tokens of its chat template. A
    token that straddles the border counts as context (`flanmoe.data.packing.tokenize`), unless the
    whole continuation lies in it: then it is what gets scored.

    Args:
        tokenizer: a fast tokenizer.
        context: what the model is given, not empty.
        continuation: what is scored, not empty.
        max_length: positions of the model. Of a longer text the left is cut off.

    Raises:
        DataError: if there is nothing to score, or nothing before it.
    """
    text = Rendered(context, continuation, task="", key="", content_hash="")
    example = tokenize(text, tokenizer)
    tokens = tuple(example.input_ids.tolist())
    num_scored = max(int(example.loss_mask.sum()), 1)
    if not continuation or len(tokens) < 2 or not context:
        raise DataError(
            "A text is scored after another one, so both must be at least one token, but found the prompt "
            f"{context[-40:]!r} and the answer {continuation[:40]!r}. Correct or leave out the example."
        )
    kept = tokens[-(max_length + 1) :]
    return Encoded(kept, min(num_scored, len(kept) - 1), truncated=len(kept) < len(tokens))


def build_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    precision: Precision,
) -> "HeldOutLM":
    """Build the language model that lm-eval evaluates; nothing is loaded or downloaded.

    Puts `model` into evaluation mode and leaves it there.

    Args:
        model: a causal language model, dense or sparse, where it is.
        tokenizer: its fast tokenizer; it is not changed.
        batch_size: most texts in one forward pass.
        precision: `bfloat16` computes matrix products under autocast; `float32` computes in the
            type of the weights. The softmax is float32 in either.
    """
    run_routers_outside_autocast(model)
    with quiet_lm_eval():
        return HeldOutLM(model, tokenizer, batch_size=batch_size, precision=precision)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Let lm-eval log errors only: what it would warn of, flanmoe counts and reports itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@final
class HeldOutLM(LM):
    """Scores continuations as training does, and computes only what they need (see `build_lm`).

    Everything else that lm-eval may ask for is left to its `HFLM` around the same model.

    Attributes:
        tokenizer: the model's tokenizer, with a padding token.
        work: tokens that have gone through the model to be scored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        # HFLM gives a tokenizer without a padding token one; not the caller's, please.
        own_tokenizer = copy.deepcopy(tokenizer)
        self._harness_model = _HARNESS_MODEL(
            pretrained=model,
            tokenizer=own_tokenizer,
            backend="causal",
            batch_size=batch_size,
            add_bos_token=False,
            mixed_precision_dtype="bfloat16" if precision == "bfloat16" else None,
            softmax_dtype="float32",
        )
        self._model = model
        self._device = model.device
        self._batch_size = batch_size
        self._autocast = precision == "bfloat16"
        self._max_length = int(self._harness_model.max_length)
        self.tokenizer = cast(Tokenizer, own_tokenizer)
        self.work = Work()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Return for each (context, continuation) its log-likelihood in nats, and if it is greedy.

        `disable_tqdm` has no effect: progress is shown on stderr by `core.console`.
        """
        return self.score([self.encode(*request.args) for request in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts in nats, through `HFLM`."""
        return self._harness_model.loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes up to a stop text, through `HFLM`."""
        return self._harness_model.generate_until(requests, disable_tqdm=disable_tqdm)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write a conversation the way the model was trained on."""
        return self._harness_model.apply_chat_template(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's caches."""
        return self._harness_model.tokenizer_name

    def encode(self, context: str, continuation: str) -> Encoded:
        """Tokenise a request for this model."""
        return encode_pair(self.tokenizer, context, continuation, max_length=self._max_length)

    def score(self, requests: Sequence[Encoded]) -> list[Answer]:
        """Score encoded requests, longest first, each distinct input once."""
        groups = _grouped(requests)
        answers: dict[int, Answer] = {}
        with progress("evaluating", total=sum(map(len, groups)), unit="tokens") as advance:
            for batch in _batches(groups, self._batch_size):
                rows = self._log_probabilities(
                    batch, [groups[inputs].num_scored for inputs in batch]
                )
                for inputs, row in zip(batch, rows, strict=True):
                    answers |= _answers(requests, groups[inputs], row)
                advance(sum(map(len, batch)))
        return [answers[index] for index in range(len(requests))]

    def _log_probabilities(
        self, batch: Sequence[Tokens], num_scored: Sequence[int]
    ) -> Iterator[Float[Tensor, "S V"]]:
        """Yield per text the log-probabilities that follow its last S inputs, S = its `num_scored`."""
        longest = max(map(len, batch))
        # On the right, where causal attention never looks back from; the value has no meaning.
        padded = [(*inputs, *[0] * (longest - len(inputs))) for inputs in batch]
        earliest = min(
            len(inputs) - scored for inputs, scored in zip(batch, num_scored, strict=True)
        )
        logits = self._forward(torch.tensor(padded, device=self.device), earliest)
        real = sum(map(len, batch))
        self.work.real_tokens += real
        self.work.padding_tokens += longest * len(batch) - real
        for inputs, scored, row in zip(batch, num_scored, logits, strict=True):
            stop = len(inputs) - earliest
            yield row[stop - scored : stop].float().log_softmax(dim=-1)

    def _forward(self, inputs: Tensor, earliest: int) -> Tensor:
        """Return the logits of all positions from `earliest` on, in the type that they were computed in."""
        kept = torch.arange(earliest, inputs.shape[1], device=inputs.device)
        with (
            torch.no_grad(),
            torch.autocast(
                inputs.device.type,
                dtype=torch.bfloat16,
                enabled=self._autocast,
            ),
        ):
            return self._model(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits


def _grouped(requests: Sequence[Encoded]) -> dict[Tokens, _Group]:
    groups: dict[Tokens, _Group] = {}
    for index, request in enumerate(requests):
        group = groups.setdefault(request.inputs, _Group())
        group.members.append(index)
        group.num_scored = max(group.num_scored, request.num_scored)
    return groups


def _batches(groups: Mapping[Tokens, _Group], batch_size: int) -> Iterator[list[Tokens]]:
    """Yield the distinct inputs in batches, longest first, texts of like length together."""
    # Single answer letters apart from long answers: a batch computes logits from the earliest
    # position that any of its texts needs.
    order = sorted(groups, key=lambda inputs: (groups[inputs].num_scored == 1, -len(inputs)))
    batch: list[Tokens] = []
    for inputs in order:
        if batch and not (
            len(batch) < batch_size
            and len(inputs) >= _SHORTEST_SHARE * len(batch[0])
            and (groups[inputs].num_scored == 1) == (groups[batch[0]].num_scored == 1)
        ):
            yield batch
            batch = []
        batch.append(inputs)
    if batch:
        yield batch


def _answers(
    requests: Sequence[Encoded], group: _Group, row: Float[Tensor, "S V"]
) -> Mapping[int, Answer]:
    found: dict[int, Answer] = {}
    for index in group.members:
        num_scored = requests[index].num_scored
        log_probabilities = row[-num_scored:]
        targets = torch.tensor(requests[index].tokens[-num_scored:], device=row.device)
        chosen = log_probabilities.gather(-1, targets[:, None])
        greedy = bool((log_probabilities.argmax(dim=-1) == targets).all())
        found[index] = (float(chosen.double().sum()), greedy)
    return found
