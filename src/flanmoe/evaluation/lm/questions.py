"""What an encoder-decoder is asked, as tokens: the context for its encoder, the answer for its decoder."""

from collections.abc import Sequence
from typing import Any

from flanmoe.core.errors import DataError
from flanmoe.data.tokenizer import Tokenizer
from flanmoe.evaluation.lm.requests import Encoded, Generation, Tokens, greedy_options


def encode_pairs_apart(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], *, max_length: int
) -> list[Encoded]:
    """Tokenise contexts and their continuations, each by itself.

    A context gets the special tokens that the tokenizer adds to a text (T5's: one at its end). A continuation
    gets none: whoever wants the end of the answer scored writes it there, as rendered reference answers do.
    Both as in lm-eval's `HFLM`. Unlike there, white space at the end of a context stays in the context: moved
    to the answer, the line break at the end of a prompt would be scored as part of it.

    Args:
        tokenizer: a fast tokenizer.
        pairs: what the encoder is given, and what is scored.
        max_length: positions of encoder and decoder. Of a longer context the left is cut off, of a longer
            continuation the right: what is left of it has its own likelihood.

    Raises:
        DataError: if there is nothing to score.
    """
    contexts = _context_tokens(tokenizer, [context for context, _ in pairs])
    continuations = _tokens(tokenizer, [text for _, text in pairs], special=False)
    found: list[Encoded] = []
    for (text, continuation), answer in zip(pairs, continuations, strict=True):
        if not answer:
            raise DataError(
                "An answer must be at least one token to be scored, but found the answer "
                f"{continuation!r} to the prompt {text[-40:]!r}. Correct or leave out the example."
            )
        context, kept = contexts[text][-max_length:], answer[:max_length]
        cut = len(context) < len(contexts[text]) or len(kept) < len(answer)
        found.append(Encoded((*context, *kept), len(kept), truncated=cut))
    return found


def encode_questions(
    tokenizer: Tokenizer, asked: Sequence[tuple[str, dict[str, Any]]], *, max_length: int
) -> list[Generation]:
    """Tokenise contexts that are to be answered (see `encode_pairs_apart`).

    An answer takes no room from its context: each has `max_length` positions of its own. lm-eval's `HFLM` lets
    an encoder-decoder write as many tokens more than `max_gen_toks` as its context has; here `max_gen_toks` is
    the limit.

    Args:
        tokenizer: a fast tokenizer.
        asked: each context with lm-eval's generation arguments: `until`, `max_gen_toks`, and whatever says
            that the likeliest token is taken.
        max_length: positions of encoder and decoder. Of a longer context the left is cut off.

    Raises:
        DataError: if an answer needs more positions than there are.
        UserError: if sampling or anything else is asked for that is not greedy.
    """
    contexts = _context_tokens(tokenizer, [context for context, _ in asked])
    found: list[Generation] = []
    for context, options in asked:
        stops, max_new_tokens = greedy_options(options)
        if max_new_tokens > max_length:
            raise DataError(
                f"An answer must fit into the {max_length} positions of the decoder, but up to "
                f"{max_new_tokens} tokens are asked for. Lower the number of new tokens."
            )
        kept = contexts[context][-max_length:]
        truncated = len(kept) < len(contexts[context])
        found.append(Generation(kept, stops, max_new_tokens, truncated=truncated))
    return found


def _context_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Tokens]:
    """Return the tokens of every distinct context; an empty one is the token that stands before texts."""
    distinct = list(dict.fromkeys(texts))
    # Rendered prompts begin with the token that the tokenizer would put there once more.
    begin = _added_at_the_beginning(tokenizer)
    encoded = _tokens(tokenizer, [text.removeprefix(begin) for text in distinct], special=True)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return {
        text: tokens if text and tokens else (int(first),)
        for text, tokens in zip(distinct, encoded, strict=True)
    }


def _added_at_the_beginning(tokenizer: Tokenizer) -> str:
    added = _tokens(tokenizer, [""], special=True)[0]
    if added and tokenizer.bos_token is not None and added[0] == tokenizer.bos_token_id:
        return str(tokenizer.bos_token)
    return ""


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool) -> list[Tokens]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [tuple(ids) for ids in encoded["input_ids"]]
