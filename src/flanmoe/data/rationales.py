"""Chains of thought as sources write them, reduced to the reasoning itself.

Renderers say the opening and the closing sentence in their own words, so both are taken off here.
"""

import re
from dataclasses import dataclass

_OPENING = re.compile(r"^\s*Let['’]s think step by step\s*[.:]?\s*")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_CLOSING = re.compile(
    r"""
    (?:^|(?<=[\s.!?]))
    (?:
        \*\*Final\ Answer\*\*:
      | (?:(?i:so|thus|therefore|hence),?\s+)?[Tt]he\s+(?:final\s+|correct\s+)?answer\s+is:?
    )
    \s+(?P<answer>[^\n]+?)\s*\.?\s*$
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A chain of thought taken apart.

    Attributes:
        text: the reasoning, without opening and closing sentence.
        answer: the answer that the closing sentence gave, None where there was none.
    """

    text: str
    answer: str | None


def take_apart(text: str) -> Reasoning:
    """Split "Let's think step by step. ... So the answer is X." into reasoning and answer.

    The closing sentence is recognised at the very end only: "(So) the (final) answer is X." or
    "**Final Answer**: X.".
    """
    body = _OPENING.sub("", text).strip()
    closing = _last_closing(body)
    if closing is None:
        return Reasoning(text=body, answer=None)
    return Reasoning(text=body[: closing.start()].strip(), answer=closing["answer"].strip())


def clean_rationale(text: str, *, answers: tuple[str, ...]) -> str:
    """Return the reasoning of a chain whose answer is known from elsewhere.

    Calculator marks of GSM8K (`<<48/2=24>>`) go, as does the opening. The closing sentence goes
    where it gives one of `answers`; another closing is part of the text.
    """
    plain = _CALCULATOR.sub("", text)
    parts = take_apart(plain)
    if parts.answer is not None and _folded(parts.answer) in {_folded(item) for item in answers}:
        return parts.text
    return _OPENING.sub("", plain).strip()


def _last_closing(body: str) -> re.Match[str] | None:
    last = None
    start = 0
    while (found := _CLOSING.search(body, start)) is not None:
        last = found
        start = found.start("answer")
    return last


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")
