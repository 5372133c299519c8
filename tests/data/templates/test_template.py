"""One wording: what it needs, how it is filled, what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.renderers.base import Exchange
from flanmoe.data.templates.template import ALWAYS_GIVEN, Form, Template

TEXTS = st.text(st.sampled_from("ab {}%#-\\\"'\n\r\t~é")).map(lambda text: f"<{text}>")


def template(prompt: str, response: str = "{{ answer }}", form: Form = "question") -> Template:
    return Template(name="t", family="kind", version=1, form=form, prompt=prompt, response=response)


@given(first=TEXTS, second=TEXTS, answer=TEXTS)
def test_texts_come_out_as_they_went_in(first: str, second: str, answer: str) -> None:
    wording = template("1. {{ first }}\n2. {{ second }}", "So: {{ answer }}")
    filled = wording.fill({"first": first, "second": second, "answer": answer})
    assert filled == Exchange(user=f"1. {first}\n2. {second}", response=f"So: {answer}")


def test_lines_of_blocks_leave_nothing_behind() -> None:
    wording = template("Q\n  {% if options %}\n\n{{ options }}\n{% endif %}\nEnd:\n\n")
    assert wording.fill({"options": "(A) x", "answer": "x"}).user == "Q\n\n(A) x\nEnd:"
    assert wording.fill({"options": "", "answer": "x"}).user == "Q\nEnd:"


def test_needs_are_the_fields_of_both_texts() -> None:
    wording = template(
        "{{ premise }} {{ options }}{% if choices %}{{ inputs }}{% endif %}",
        "{{ rationale }} {{ answer }} {{ target }} {{ note }}",
    )
    assert wording.needs == {"premise", "note"}
    every = " ".join(f"{{{{ {name} }}}}" for name in ALWAYS_GIVEN)
    assert template(every).needs == frozenset()


@pytest.mark.parametrize(
    ("values", "has"),
    [
        ({"answer": "a", "premise": "p", "note": "n"}, "`note`, `premise`"),
        ({"answer": "a", "inputs": "i"}, "no named fields"),
    ],
)
def test_all_that_is_missing_is_named(values: dict[str, str], has: str) -> None:
    wording = template(
        "{{ word }} {{ premise }}" if "premise" in values else "{{ word }}", "{{ x }}"
    )
    with pytest.raises(DataError) as caught:
        wording.fill(values)
    assert str(caught.value) == (
        f"The template `kind/t` needs `word`, `x`, but the example has only {has}. Map names with "
        "`template.fields`, or choose another family."
    )


@pytest.mark.parametrize("part", ["prompt", "response"])
def test_invalid_jinja_is_refused(part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        template(**{"prompt": "fine", part: "one\n{{ two"})
    assert str(caught.value) == (
        f"The {part} of template `kind/t` must be valid jinja2, but: unexpected end of template, expected "
        "'end of print statement'. (line 2)."
    )
