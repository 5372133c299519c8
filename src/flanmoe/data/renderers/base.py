"""What all renderers share: what they return, their registry, the text of a question."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined, Template

from flanmoe.core.registry import Registry
from flanmoe.core.seeds import SeedTree
from flanmoe.data.example import Example
from flanmoe.data.options import letter


class Exchange(NamedTuple):
    """One question and its answer.

    Attributes:
        user: what the user says.
        response: what the model is to say.
    """

    user: str
    response: str


@dataclass(frozen=True, slots=True)
class Occasion:
    """What one rendering may depend on beside the example: nothing else, so it can be repeated.

    Attributes:
        seeds: the branch of the seed tree that belongs to this sample; wordings, exemplars and styles
            are drawn from it.
        count_tokens: tokens of a text, for budgets.
    """

    seeds: SeedTree
    count_tokens: Callable[[str], int]


Renderer = Callable[[Example, Occasion], Exchange]

renderers: Registry[Renderer] = Registry("renderer")

# Strict: a variable that is not given is an error, never an empty string.
STRICT = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

_QUESTION = STRICT.from_string(
    """\
{% if instruction %}
{{ instruction }}

{% endif %}
{{ inputs }}
{% if options %}

Options:
{% for option in options %}
({{ option.letter }}) {{ option.text }}
{% endfor %}
{% endif %}
"""
)


def fill(template: str, **values: Any) -> str:
    """Fill in a template; a variable that it names and `values` lacks is an error."""
    return _compiled(template).render(**values).strip()


@lru_cache(maxsize=1024)
def _compiled(template: str) -> Template:
    # Compiling takes twenty times as long as filling in.
    return STRICT.from_string(template)


def question_text(example: Example) -> str:
    """Return the question, its options as "(A) ..." lines, the task's own instruction before it."""
    options = [
        {"letter": letter(index), "text": text} for index, text in enumerate(example.choices)
    ]
    return _QUESTION.render(
        instruction=example.metadata.get("instruction", ""), inputs=example.inputs, options=options
    ).strip()


def answer_text(example: Example) -> str:
    """Return the short answer: "(B)" where there are options, else the target."""
    if example.label is None:
        return example.target
    return answer_texts(example)[example.label]


def answer_texts(example: Example) -> tuple[str, ...]:
    """Return the short answer of every option, in order; empty where there are none."""
    return tuple(f"({letter(index)})" for index in range(len(example.choices)))
