"""Whether a text gives the answer of an example."""

from flanmoe.data.example import Example
from flanmoe.evaluation.answers.closing import final_answer
from flanmoe.evaluation.answers.numbers import extract_number, read_number
from flanmoe.evaluation.answers.options import extract_option
from flanmoe.evaluation.answers.spans import extract_span, normalise_span

_TWO_ANSWERS = (("yes", "no"), ("true", "false"))


def same_answer(text: str, example: Example) -> bool | None:
    """Say whether a text gives the answer of an example; None where no answer can be read from it.

    Options are compared by index, numbers by value ("$1,000.00" is "1000"), "yes" and "no", "true" and
    "false" as two options, all else as normalised spans. `other_targets` in an example's metadata are as
    good as its target. Give `direct_answer(text) or ""` where the prompt asked for the answer alone.
    """
    targets = (example.target, *example.metadata.get("other_targets", ()))
    values = {read_number(target) for target in targets}
    spans = {normalise_span(target) for target in targets}
    if example.label is not None:
        found, right = extract_option(text, example.choices), {example.label}
    elif pair := next((pair for pair in _TWO_ANSWERS if spans <= set(pair)), None):
        found, right = extract_option(text, pair), {pair.index(span) for span in spans}
    elif None not in values:
        found, right = extract_number(text), values
    elif not spans.isdisjoint(map(normalise_span, (text, final_answer(text) or text))):
        return True  # a target may be longer than the one sentence that a span is
    else:
        found, right = extract_span(text), spans
    return None if found is None else found in right
