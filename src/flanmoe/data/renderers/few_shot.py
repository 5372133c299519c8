"""Questions with answers shown before the one that is asked.

Exemplars stand in one of several patterns. They are drawn from a pool, never hold the question itself,
and are taken as long as the whole prompt stays within a budget of tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from flanmoe.data.renderers.base import Exchange


@dataclass(frozen=True, slots=True)
class Pattern:
    """How exemplars and the question are strung together.

    Attributes:
        question: before every question.
        answer: between a question and its answer; it also closes the prompt.
        separator: between an exemplar and what follows it.
        opening: before the first exemplar.
    """

    question: str
    answer: str
    separator: str = "\n\n"
    opening: str = ""

    def shown(self, exchange: Exchange) -> str:
        """Return an exemplar with what separates it from the next."""
        return self.question + exchange.user + self.answer + exchange.response + self.separator

    def asked(self, user: str) -> str:
        """Return the question that is left to answer."""
        return (self.question + user + self.answer).rstrip()


PATTERNS = (
    Pattern("", "\n"),
    Pattern("Q: ", "\nA: "),
    Pattern("Question: ", "\nAnswer: "),
    Pattern("Input: ", "\nOutput: "),
    Pattern("Example:\n", "\nSolution: ", "\n\n"),
    Pattern("", "\n=> ", "\n\n"),
    Pattern("Task: ", "\nResult: ", "\n---\n"),
    Pattern("", "\n\n", "\n\n###\n\n"),
    Pattern("[in] ", "\n[out] ", "\n\n"),
    Pattern("Problem\n", "\nReply\n", "\n\n", "Here is how it is done.\n\n"),
)


def with_exemplars(
    asked: Exchange,
    candidates: Iterable[Exchange],
    *,
    pattern: Pattern,
    number: int,
    budget: int,
    count_tokens: Callable[[str], int],
) -> Exchange | None:
    """Put exemplars before a question; None where not one of them fits.

    Args:
        asked: the question and its answer.
        candidates: exemplars in the order in which they are tried; one that is too long is passed over.
        pattern: how they are strung together.
        number: how many are shown at most.
        budget: tokens that the whole prompt may have.
        count_tokens: tokens of a text.
    """
    question = pattern.asked(asked.user)
    left = budget - count_tokens(pattern.opening + question)
    shown: list[str] = []
    for candidate in candidates:
        text = pattern.shown(candidate)
        tokens = count_tokens(text)
        if tokens <= left:
            shown.append(text)
            left -= tokens
        if len(shown) == number:
            break
    if not shown:
        return None
    return Exchange(user=_joined(pattern, shown, question), response=asked.response)


def _joined(pattern: Pattern, shown: Sequence[str], question: str) -> str:
    return pattern.opening + "".join(shown) + question
