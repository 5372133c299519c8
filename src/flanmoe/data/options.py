"""Answer options that stand inside a question, taken out of it.

Nothing is guessed: the letters must run A, B, C, ... without a gap, and the answer must name one of
the options. Where that does not hold, the question stays as it is and has no choices.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAXIMUM_OPTIONS = 26

_HEADING = re.compile(r"\n[ \t]*Options:[ \t]*\n")
_TRAILING_HEADING = re.compile(r"\s*(?:\*\*Possible Answers\*\*:|Options:)\s*$")
_DASH = re.compile(r"^-[ \t]+(.*)$")
_LETTER_ANSWER = re.compile(r"^\(?([A-Z])[).]{0,2}$")
_LETTER_AND_TEXT = re.compile(r"^\(?([A-Z])\)\s+(.+)$", re.DOTALL)

# How an option's letter is written: "(A) ", "A) " and "A. ".
_PARENTHESES = re.compile(r"(?:(?<=\s)|^)\(([A-Z])\)\s+")
_CLOSING = re.compile(r"(?:(?<=\s)|^)([A-Z])\)\s+")
_DOTTED = re.compile(r"(?:(?<=\s)|^)([A-Z])\.\s+")


@dataclass(frozen=True, slots=True)
class SplitQuestion:
    """A question and its options.

    Attributes:
        stem: the question without its options.
        choices: the options in order.
        label: index of the right one.
    """

    stem: str
    choices: tuple[str, ...]
    label: int


def letter(index: int) -> str:
    """Return the letter of an option: A for 0, B for 1, ..., and AA, AB, ... after Z."""
    before, place = divmod(index, MAXIMUM_OPTIONS)
    return (letter(before - 1) if before else "") + chr(ord("A") + place)


def split_question(question: str, answer: str) -> SplitQuestion | None:
    """Take the options out of a question, or return None where that is not clearly possible.

    Understood are a block of lines under "Options:" ("(A) ...", "- (A) ..." or "- ..."), options
    "(A) ... (B) ..." that begin a line, and "A. ... B. ..." at the end of the text.
    """
    readers: tuple[Callable[[str, str], SplitQuestion | None], ...] = (
        _from_block,
        _from_parentheses,
        _from_dotted,
    )
    for reader in readers:
        found = reader(question, answer)
        if found is not None:
            return found
    return None


def read_options(text: str) -> tuple[str, ...] | None:
    """Read options written as "A) ... B) ..."; None where the letters do not run from A on."""
    return _lettered(text, _CLOSING)


def looks_optional(question: str) -> bool:
    """Say whether a question seems to carry options, so that failures to split can be counted."""
    return bool(
        _HEADING.search(question) or re.search(r"(?:^|\s)\(A\)\s.*\s\(B\)\s", question, re.DOTALL)
    )


def label_of(answer: str, choices: Sequence[str]) -> int | None:
    """Return which option an answer names by its letter, None where it names none."""
    bare = _LETTER_ANSWER.match(answer.strip())
    if bare:
        index = ord(bare[1]) - ord("A")
        return index if index < len(choices) else None
    both = _LETTER_AND_TEXT.match(answer.strip())
    if both:
        index = ord(both[1]) - ord("A")
        if index < len(choices) and _same(choices[index], both[2]):
            return index
    return None


def _from_block(question: str, answer: str) -> SplitQuestion | None:
    headings = list(_HEADING.finditer(question))
    if not headings:
        return None
    stem = question[: headings[-1].start()]
    block = question[headings[-1].end() :].strip()
    lines = [line.strip() for line in block.splitlines() if line.strip()]
    dashed = [_DASH.match(line) for line in lines]
    items = [match[1] for match in dashed if match]
    if lines and len(items) == len(lines):
        lettered = _lettered("\n".join(items), _PARENTHESES)
        if lettered is not None and len(lettered) == len(items):
            return _by_letter(stem, lettered, answer)
        return _by_text(stem, items, answer)
    return _by_letter(stem, _lettered(block, _PARENTHESES), answer)


def _from_parentheses(question: str, answer: str) -> SplitQuestion | None:
    starts = list(re.finditer(r"(?:^|\n)[ \t]*(?=\(A\)\s)", question))
    if not starts:
        return None
    begin = starts[-1].end()
    return _by_letter(question[:begin], _lettered(question[begin:], _PARENTHESES), answer)


def _from_dotted(question: str, answer: str) -> SplitQuestion | None:
    starts = [match.start() for match in _DOTTED.finditer(question) if match[1] == "A"]
    if not starts:
        return None
    begin = starts[-1]
    return _by_letter(question[:begin], _lettered(question[begin:], _DOTTED), answer)


def _lettered(text: str, marker: re.Pattern[str]) -> tuple[str, ...] | None:
    found = list(marker.finditer(text))
    letters = [match[1] for match in found]
    if not 2 <= len(letters) <= MAXIMUM_OPTIONS or found[0].start() != 0:
        return None
    if letters != [letter(index) for index in range(len(letters))]:
        return None
    ends = [match.start() for match in found[1:]] + [len(text)]
    choices = tuple(text[match.end() : end].strip() for match, end in zip(found, ends, strict=True))
    return choices if all(choices) else None


def _by_letter(stem: str, choices: Sequence[str] | None, answer: str) -> SplitQuestion | None:
    if choices is None:
        return None
    return _checked(stem, choices, label_of(answer, choices))


def _by_text(stem: str, choices: Sequence[str], answer: str) -> SplitQuestion | None:
    if not 2 <= len(choices) <= MAXIMUM_OPTIONS:
        return None
    places = [index for index, choice in enumerate(choices) if _same(choice, answer)]
    return _checked(stem, choices, places[0] if len(places) == 1 else None)


def _checked(stem: str, choices: Sequence[str], label: int | None) -> SplitQuestion | None:
    clean = _TRAILING_HEADING.sub("", stem).strip()
    if label is None or not clean:
        return None
    return SplitQuestion(stem=clean, choices=tuple(choices), label=label)


def _same(left: str, right: str) -> bool:
    return " ".join(left.split()) == " ".join(right.split())
