"""Answers in words, normalised for comparison.

Source: `normalize_answer` (SQuAD's official scorer).
"""

import re
import string
import unicodedata

from flanmoe.evaluation.answers.closing import direct_answer, final_answer
from flanmoe.evaluation.answers.numbers import plain_mathematics
from flanmoe.evaluation.answers.sentences import PLAIN_SIGNS, sentences

_KEPT_SIGN = re.compile(r"(?<=[0-9])[./:](?=[0-9])|(?<!\w)-(?=\.?[0-9])|(?<![\w.])\.(?=[0-9])")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_span(text: str) -> str:
    """Return a text as SQuAD's official scorer compares it: no case, punctuation, articles, extra spaces.

    Departures: typographic quotes and dashes are punctuation like plain ones; the sign and the point of
    a number stay ("3.5" is not "35", "-3" not "3"); and what would be nothing ("] } ]", "A") stays.
    """
    plain = " ".join(plain_mathematics(text).translate(PLAIN_SIGNS).casefold().split())
    kept = {match.start() for match in _KEPT_SIGN.finditer(plain)}
    bare = "".join(
        character
        for position, character in enumerate(plain)
        if position in kept or not _is_punctuation(character)
    )
    return " ".join(_ARTICLES.sub(" ", bare).split()) or plain


def extract_span(text: str) -> str | None:
    """Return the answer of a text in words, normalised for comparison; None where there is none.

    It is the first sentence after the closing phrase. A text without one is a direct answer if it is a
    single line; of a longer text None is returned, for any of it would be a guess (FLAN's
    `take_cot_answer` returns all of it; give `direct_answer(text)` for its `take_first_line`).
    """
    answer = final_answer(text)
    if answer is None and len(text.split("\n")) == 1:
        answer = direct_answer(text)
    return normalise_span(sentences(answer)[0]) if answer else None


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
