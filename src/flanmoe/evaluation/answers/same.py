"""Whether a text gives the answer of an example."""

from typing import NamedTuple

from flanmoe.data.example import Example
from flanmoe.data.options import letter
from flanmoe.evaluation.answers.closing import final_answer
from flanmoe.evaluation.answers.numbers import extract_number, read_number
from flanmoe.evaluation.answers.options import extract_option
from flanmoe.evaluation.answers.spans import extract_span, normalise_span

_TWO_ANSWERS = (("yes", "no"), ("true", "false"))


class Graded(NamedTuple):
    """What a text answers, and whether that is right.

    Attributes:
        extracted: the answer as it was read: "(B)", a number, normalised words; None where none can be read.
        right: whether it is the example's answer; None where none can be read.
    """

    extracted: str | None
    right: bool | None


def same_answer(text: str, example: Example) -> bool | None:
    """Say whether a text gives the answer of an example; None where no answer can be read from it.

    Options are compared by index, numbers by value ("$1,000.00" is "1000"), "yes" and "no", "true" and
    "false" as two options, all else as normalised spans. `other_targets` in an example's metadata are as
    good as its target. Give `direct_answer(text) or ""` where the prompt asked for the answer alone.
    """
    return graded_answer(text, example).right


def graded_answer(text: str, example: Example) -> Graded:
    """Read the answer out of a text and compare it as `same_answer` says."""
    targets = (example.target, *example.metadata.get("other_targets", ()))
    values = {read_number(target) for target in targets}
    spans = {normalise_span(target) for target in targets}
    if example.label is not None:
        option = extract_option(text, example.choices)
        written = None if option is None else f"({letter(option)})"
        return _graded(written, option == example.label)
    if pair := next((pair for pair in _TWO_ANSWERS if spans <= set(pair)), None):
        option = extract_option(text, pair)
        written = None if option is None else pair[option]
        return _graded(written, written in spans)
    if None not in values:
        number = extract_number(text)
        return _graded(None if number is None else str(number), number in values)
    # A target may be longer than the one sentence that a span is.
    for whole in map(normalise_span, (text, final_answer(text) or text)):
        if whole in spans:
            return Graded(whole, True)
    span = extract_span(text)
    return _graded(span, span in spans)


def _graded(extracted: str | None, right: bool) -> Graded:
    return Graded(extracted, None if extracted is None else right)
