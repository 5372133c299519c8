"""What a language model is asked, as tokens: continuations to score, contexts to go on from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flanmoe.core.errors import DataError, UserError
from flanmoe.data.example import Rendered
from flanmoe.data.packing import tokenize_all
from flanmoe.data.tokenizer import Tokenizer

Tokens = tuple[int, ...]
Answer = tuple[float, bool]

_DEFAULT_NEW_TOKENS = 256


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

    @property
    def context(self) -> Tokens:
        """What stands before the continuation."""
        return self.tokens[: -self.num_scored]

    @property
    def targets(self) -> Tokens:
        """The tokens that are scored."""
        return self.tokens[-self.num_scored :]


@dataclass(frozen=True, slots=True)
class Generation:
    """A context to go on from, greedily.

    Attributes:
        tokens: the context.
        stops: texts that end the answer; they are not part of it.
        max_new_tokens: most tokens that are written.
        truncated: whether tokens were cut off on the left.
    """

    tokens: Tokens
    stops: tuple[str, ...]
    max_new_tokens: int
    truncated: bool = False


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, max_length: int
) -> list[Encoded]:
    """Tokenise contexts and their continuations together, exactly as training does.

    Nothing is added: a rendered prompt already holds the special tokens of its chat template. A
    token that straddles the border counts as context (`flanmoe.data.packing.tokenize`), unless the
    whole continuation lies in it: then it is what gets scored.

    Args:
        tokenizer: a fast tokenizer.
        pairs: what the model is given, and what is scored; neither is empty.
        max_length: positions of the model. Of a longer text the left is cut off.

    Raises:
        DataError: if there is nothing to score, or nothing before it.
    """
    texts = [
        Rendered(context, continuation, task="", key="", content_hash="")
        for context, continuation in pairs
    ]
    found: list[Encoded] = []
    for (context, continuation), example in zip(pairs, tokenize_all(texts, tokenizer), strict=True):
        tokens = tuple(example.input_ids.tolist())
        if not continuation or len(tokens) < 2 or not context:
            raise DataError(
                "A text is scored after another one, so both must be at least one token, but found the "
                f"prompt {context[-40:]!r} and the answer {continuation[:40]!r}. Correct or leave out the "
                "example."
            )
        kept = tokens[-(max_length + 1) :]
        num_scored = min(max(int(example.loss_mask.sum()), 1), len(kept) - 1)
        found.append(Encoded(kept, num_scored, truncated=len(kept) < len(tokens)))
    return found


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, max_length: int
) -> Encoded:
    """Tokenise one context with its continuation (see `encode_pairs`)."""
    return encode_pairs(tokenizer, [(context, continuation)], max_length=max_length)[0]


def encode_generations(
    tokenizer: Tokenizer, asked: Sequence[tuple[str, dict[str, Any]]], *, max_length: int
) -> list[Generation]:
    """Tokenise contexts to go on from.

    Args:
        tokenizer: a fast tokenizer.
        asked: each context with lm-eval's generation arguments: `until`, `max_gen_toks`, and whatever says
            that the likeliest token is taken.
        max_length: positions of the model. Of a longer context the left is cut off, so that the answer
            still fits behind it.

    Raises:
        DataError: if a context is empty, or no room is left for it before the answer.
        UserError: if sampling or anything else is asked for that is not greedy.
    """
    if not asked:
        return []
    found: list[Generation] = []
    encoded = tokenizer(
        [context for context, _ in asked],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    for (context, options), ids in zip(asked, encoded, strict=True):
        stops, max_new_tokens = greedy_options(options)
        room = max_length - max_new_tokens
        if not ids or room < 1:
            raise DataError(
                f"An answer of up to {max_new_tokens} tokens needs a context before it and {max_length} "
                f"positions for both, but found {len(ids)} tokens of context ({context[-40:]!r}). Lower the "
                "number of new tokens, or correct the example."
            )
        kept = tuple(ids[-room:])
        found.append(Generation(kept, stops, max_new_tokens, truncated=len(kept) < len(ids)))
    return found


# What a task may ask for that taking the likeliest token fulfils or makes meaningless.
_WITHOUT_EFFECT = {"temperature", "top_p", "top_k", "num_return_sequences", "use_cache"}


def greedy_options(options: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Return the stops and the most new tokens of lm-eval's generation arguments.

    Raises:
        UserError: if sampling or anything else is asked for that is not greedy.
    """
    left = dict(options)
    until = left.pop("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until or ())
    max_new_tokens = left.pop("max_gen_toks", left.pop("max_new_tokens", _DEFAULT_NEW_TOKENS))
    sampled = bool(left.pop("do_sample", False)) and float(left.get("temperature", 1.0)) > 0
    others = [name for name in left if name not in _WITHOUT_EFFECT]
    if sampled or others or int(left.get("num_return_sequences", 1)) > 1:
        raise UserError(
            "Answers are written greedily here (`until`, `max_gen_toks`), but the task asks for "
            f"{options}. Take a version of the task without sampling, or change its generation_kwargs."
        )
    return tuple(stop for stop in stops if stop), int(max_new_tokens)
