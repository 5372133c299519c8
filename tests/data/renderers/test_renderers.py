"""Golden texts of every renderer."""

import pytest
from jinja2 import UndefinedError

from flanmoe.core.errors import ConfigError, DataError
from flanmoe.data.example import Example
from flanmoe.data.renderers import (
    Exchange,
    Occasion,
    answer_text,
    answer_texts,
    renderer_named,
    renderers,
)
from flanmoe.data.renderers.base import fill

CHOICE = Example(
    inputs="Which cavity holds the gland?",
    target="Cranial",
    choices=("Abdominal", "Cranial"),
    label=1,
    rationales=("It hangs from the brain.", "Another chain."),
    key="anatomy-1",
)
OPEN = Example(inputs="2 + 2?", target="4", rationales=("Two and two.",))
BARE = Example(inputs="Sing.\n\n{{ not a template }}", target="La la.")
INSTRUCTED = Example(
    inputs="True and False is", target="False", metadata={"instruction": "Evaluate."}
)


@pytest.mark.parametrize(
    ("name", "example", "user", "response"),
    [
        (
            "direct",
            CHOICE,
            "Which cavity holds the gland?\n\nOptions:\n(A) Abdominal\n(B) Cranial\n\n"
            "Reply with the letter of the right option only.",
            "(B)",
        ),
        ("direct", OPEN, "2 + 2?\n\nReply with the answer only.", "4"),
        (
            "direct",
            INSTRUCTED,
            "Evaluate.\n\nTrue and False is\n\nReply with the answer only.",
            "False",
        ),
        (
            "chain_of_thought",
            CHOICE,
            "Which cavity holds the gland?\n\nOptions:\n(A) Abdominal\n(B) Cranial\n\n"
            "Reason step by step, then give the answer.",
            "It hangs from the brain.\nThe answer is (B).",
        ),
        (
            "chain_of_thought.v1",
            OPEN,
            "2 + 2?\n\nReason step by step, then give the answer.",
            "Two and two.\nThe answer is 4.",
        ),
        ("instruction", BARE, "Sing.\n\n{{ not a template }}", "La la."),
        (
            "instruction",
            CHOICE,
            "Which cavity holds the gland?\n\nOptions:\n(A) Abdominal\n(B) Cranial",
            "(B)",
        ),
    ],
)
def test_what_is_asked_and_answered(
    name: str, example: Example, user: str, response: str, occasion: Occasion
) -> None:
    assert renderer_named(name)(example, occasion) == Exchange(user=user, response=response)


@pytest.mark.parametrize(
    ("example", "chosen"),
    [
        (OPEN, "chain_of_thought"),
        (BARE, "instruction"),
        (Example(inputs="Which?", target="x", choices=("x", "y"), label=0), "direct"),
    ],
)
def test_auto_chooses_by_what_the_example_has(
    example: Example, chosen: str, occasion: Occasion
) -> None:
    assert renderer_named("auto")(example, occasion) == renderer_named(chosen)(example, occasion)


def test_an_answer_that_ends_a_sentence_gets_no_second_stop(occasion: Occasion) -> None:
    example = Example(inputs="How?", target="It stops.", rationales=("Look.",))
    assert renderer_named("chain_of_thought")(example, occasion).response == (
        "Look.\nThe answer is It stops."
    )


def test_a_chain_of_thought_needs_a_rationale(occasion: Occasion) -> None:
    with pytest.raises(DataError) as caught:
        renderer_named("chain_of_thought")(Example(inputs="Q", target="T", key="sums-4"), occasion)
    assert str(caught.value) == (
        "The renderer `chain_of_thought` needs a rationale, but example `sums-4` has none. Set "
        "`renderer: auto` for the task, which falls back to `direct` or `instruction`."
    )


def test_an_unknown_renderer_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean `direct`\?"):
        renderer_named("dirct")
    assert list(renderers) == ["chain_of_thought.v1", "direct.v1", "instruction.v1"]


def test_the_short_answers_of_all_options() -> None:
    assert answer_texts(CHOICE) == ("(A)", "(B)")
    assert answer_text(CHOICE) == "(B)"
    assert answer_texts(OPEN) == ()
    assert answer_text(OPEN) == "4"


def test_templates_are_strict() -> None:
    with pytest.raises(UndefinedError, match="'missing' is undefined"):
        fill("{{ missing }}")
